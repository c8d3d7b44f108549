"""Where a module stands in a model, told from its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<layer>\d+)\.(?P<module>.+)")


@dataclass(frozen=True)
class Grid:
    """Values of modules as a table layer x kind of module.

    Args:
        rows: labels of the layers, in the model's order.
        columns: labels of the kinds of modules.
        cells: the values of each cell: none where a layer lacks the kind, several for experts.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Sequence[float]]]


def locate(name: str) -> tuple[str, str, str]:
    """Stack of layers, layer and kind of a module: ``("model.layers", "3", "mlp.up_proj")``.

    The first whole number in a name is its layer; later numbers (experts) become ``*``. A name
    without a number has neither stack nor layer.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return "", "", name
    module = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", match["module"])
    return match["stack"] or "", match["layer"], module


def short_labels(modules: Sequence[str]) -> list[str]:
    """The shortest endings that tell the kinds of modules apart."""
    labels = []
    for module in modules:
        parts = module.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in modules) == 1)
        labels.append(next(alone, module))
    return labels


def without_shared_ending(labels: Sequence[str]) -> list[str]:
    """Labels without what all of them end with: ``q``, ``down`` instead of ``q_proj``, ``down_proj``."""
    ends = {label[label.rfind("_") :] for label in labels}
    if len(ends) != 1 or not all("_" in label[1:] for label in labels):
        return list(labels)
    return [label.removesuffix(*ends) for label in labels]


def layer_grid(values: Mapping[str, float]) -> Grid:
    """Arrange one value a module, by full name in the model's order, as layers x kinds."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    kinds: dict[str, None] = {}
    for name, value in values.items():
        stack, layer, kind = locate(name)
        cells.setdefault((stack, layer), {}).setdefault(kind, []).append(value)
        kinds[kind] = None
    several_stacks = len({stack for stack, layer in cells if layer}) > 1
    rows = [f"{stack}.{layer}" if several_stacks and layer else layer or "-" for stack, layer in cells]
    return Grid(rows, short_labels(list(kinds)), [[row.get(kind, []) for kind in kinds] for row in cells.values()])


def module_labels(names: Sequence[str], among: Sequence[str]) -> list[str]:
    """What to call single modules in a legend: ``q_proj 3``, or the whole name where that is not unique.

    Args:
        names: full names of the modules to label.
        among: full names of all modules of the model.
    """
    kinds = list(dict.fromkeys(locate(name)[2] for name in among))
    short = dict(zip(kinds, short_labels(kinds), strict=True))
    stacks = {locate(name)[0] for name in among if locate(name)[1]}
    labels = [f"{short[locate(name)[2]]} {locate(name)[1]}".strip() for name in names]
    unique = len(set(labels)) == len(labels) and len(stacks) < 2
    return labels if unique else list(names)
