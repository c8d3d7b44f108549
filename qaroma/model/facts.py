"""What decisions need to know of a base before it is loaded: the sizes of its layers, and of its weights."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from qaroma.config.decisions import ModelFacts
from qaroma.config.tasks import WRITING
from qaroma.method.dequantise import layer_shape
from qaroma.method.targets import find_targets
from qaroma.model.found import FoundModel
from qaroma.model.skeleton import skeleton
from qaroma.model.weight_files import INDEX, SINGLE, names_in

SAMPLED_WEIGHTS, SAMPLED_ROWS = 8, 256  # layers, and rows of each, whose elements are looked at


def facts_of_base(base: FoundModel, targets: str | list[str], *, task: str) -> ModelFacts:
    """The facts of a base that lies on disk or on the hub; of its weights some rows are read.

    Where no plain weight can be read (4-bit checkpoints, GGUF), the configuration's initial size stands in for the
    weights': a run measures its rate in any case.

    Args:
        base: looked up.
        targets: as :func:`qaroma.method.targets.find_targets` takes them.
        task: of the run.

    Raises:
        QaromaError: targets that the base does not have.
    """
    model = skeleton(base.config, trust_remote_code=base.trust_remote_code, classifier=task not in WRITING)
    initial = float(getattr(base.config.get_text_config(), "initializer_range", None) or 0.02)
    return facts_of_module(model, find_targets(model, targets), weight_std=_stored_std(base) or initial)


def component_parameters(base: FoundModel, targets: str | list[str], *, task: str) -> int:
    """N + M of one rank-one component, summed over all layers that are adapted; of the weights none is read.

    Args:
        base, targets, task: as :func:`facts_of_base` takes them.
    """
    model = skeleton(base.config, trust_remote_code=base.trust_remote_code, classifier=task not in WRITING)
    return facts_of_module(model, find_targets(model, targets), weight_std=0.0).component_parameters


def facts_of_module(model: nn.Module, names: list[str], *, weight_std: float | None = None) -> ModelFacts:
    """The facts of a model in memory.

    Args:
        model: with plain linear layers, or on device ``meta``.
        names: of the layers that are adapted.
        weight_std: where the weights cannot be looked at.
    """
    layers: list[Any] = [model.get_submodule(name) for name in names]
    if weight_std is None:
        weight_std = median(float(layer.weight.detach().float().std()) for layer in layers)
    shapes = [shape for layer in layers if (shape := layer_shape(layer)) is not None]
    return ModelFacts(
        component_parameters=sum(rows + columns for rows, columns in shapes),
        width=int(median(columns for _, columns in shapes)),
        weight_std=weight_std,
    )


def _stored_std(base: FoundModel) -> float | None:
    """The median over some weights of a safetensors checkpoint; None where there is none to be read."""
    from safetensors import SafetensorError, safe_open

    stds: list[float] = []
    try:
        for file in _files(base):
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if _is_linear(name, tensors.get_slice(name))]  # noqa: SIM118
                for name in names[:: max(1, len(names) // SAMPLED_WEIGHTS)]:
                    rows: Tensor = tensors.get_slice(name)[:SAMPLED_ROWS]
                    stds.append(float(rows.float().std()))
    except (OSError, SafetensorError):  # a file that is not there or not whole is told when it is loaded
        return None
    return median(stds) if stds else None


def _files(base: FoundModel) -> list[Path]:
    """The first safetensors file of a base: of a folder, or of the hub, where it will be needed in any case."""
    if base.place.gguf_file is not None:
        return []
    index = base.place.file(INDEX, revision=base.revision)
    first = base.place.file(names_in(index)[0] if index else SINGLE, revision=base.revision)
    return [first] if first else []


def _is_linear(name: str, tensor: Any) -> bool:
    """Whether a stored tensor is the plain weight of a layer that an adapter would take."""
    plain = tensor.get_dtype() in ("F32", "F16", "BF16")
    return plain and len(tensor.get_shape()) == 2 and name.endswith(".weight") and "embed" not in name
