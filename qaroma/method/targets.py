"""Which of a model's layers an adapter takes."""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

from torch import nn

from qaroma.errors import QaromaError
from qaroma.method.head import head_names
from qaroma.method.linear import has_matrix, is_linear, uncalled_layers
from qaroma.text.patterns import Patterns

_ALL = "--set growth.target_modules=all-linear"


def find_targets(model: Any, targets: str | list[str] = "all-linear") -> list[str]:
    """Choose the linear layers that get an adapter.

    The output head is never among them. 'all-linear' means those of the language model: a vision
    tower beside it is left alone unless its layers are named.

    Args:
        model: a transformers model, with plain or 4-bit linear layers.
        targets: 'all-linear'; or names or name suffixes ('q_proj', 'mlp.down_proj'), one or a list;
            or one string that is a regular expression for the whole name.

    Returns:
        Full module names, in the model's order, without repetition.

    Raises:
        QaromaError: a name that matches nothing (the nearest ones are said), a layer that cannot carry
            an adapter here (fused experts, a router, the head), or a model without linear layers.
    """
    linear = _layers_by_use(model).linear
    if not linear:
        raise QaromaError(_nothing_to_adapt(model))
    if targets == "all-linear":
        return _in_language_model(model, linear)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise QaromaError(f"got no target modules; expected at least one name. Type: {_ALL}")
    chosen = {name for name in linear if any(_matches(name, target) for target in wanted)}
    if not chosen and isinstance(targets, str):
        chosen = set(_by_expression(linear, targets))
    unknown = [target for target in wanted if not any(_matches(name, target) for name in linear)]
    if unknown and not (isinstance(targets, str) and chosen):
        raise QaromaError(" ".join(_why_not(model, target, linear) for target in unknown))
    return [name for name in linear if name in chosen]


def unadaptable(model: Any) -> list[str]:
    """Say what of a model no adapter can take, though it holds weights like a linear layer's.

    Args:
        model: a transformers model.

    Returns:
        One sentence for each kind, for the caller to print; empty for most models.
    """
    notes = []
    experts = _fused_experts(model)
    if experts:
        notes.append(
            f"{len(experts)} fused expert weights ({experts[0]}, ...) are not linear layers: "
            "they get no adapter and are not quantised."
        )
    layers = _layers_by_use(model)
    if layers.uncalled:
        notes.append(
            f"{len(layers.uncalled)} layers ({layers.uncalled[0]}, ...) are never called, only their weights are used: "
            "they get no adapter and are not quantised."
        )
    for kind, names in _by_kind(model, layers.other).items():
        notes.append(
            f"{len(names)} layers of type {kind} ({names[0]}, ...) do more than multiply: they get no adapter."
        )
    if getattr(model, "is_loaded_in_4bit", False):
        modules = dict(model.named_modules())
        dense = [name for name in layers.linear if getattr(modules[name].weight, "quant_state", None) is None]
        for kind, names in _by_kind(model, dense).items():
            notes.append(
                f"{len(names)} layers of type {kind} ({names[0]}, ...) are not in 4 bits: "
                "transformers does not put that type there."
            )
    return notes


class _Layers(NamedTuple):
    """A model's layers with a weight matrix, but for its head, by what can be done with them.

    Attributes:
        linear: take an adapter.
        uncalled: are linear, and never called.
        other: do something else than a linear layer.
    """

    linear: list[str]
    uncalled: list[str]
    other: list[str]


def _layers_by_use(model: Any) -> _Layers:
    head, uncalled = _head(model), uncalled_layers(model)
    kinds: dict[tuple[str, ...], bool] = {}  # one layer of a kind is called, not every one
    layers = _Layers([], [], [])
    for name, module in model.named_modules():
        if module in head or not has_matrix(module):
            continue
        kind = (type(module).__module__, type(module).__qualname__)
        if kind not in kinds:
            kinds[kind] = is_linear(module)
        place = layers.other if not kinds[kind] else layers.uncalled if name in uncalled else layers.linear
        place.append(name)
    return layers


def _by_kind(model: Any, names: list[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(type(model.get_submodule(name)).__name__, []).append(name)
    return kinds


def _head(model: Any) -> set[nn.Module]:
    """The output embeddings of a language model; of a classifier, all that lies outside its backbone."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return {head}
    if not hasattr(model, "base_model") or model.base_model is model:
        return set()
    return {module for name in head_names(model) for module in model.get_submodule(name).modules()}


def _fused_experts(model: Any) -> list[str]:
    """Names of 3-D parameters of experts: (experts, out, in), multiplied group by group, not by a linear layer."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]


def _in_language_model(model: Any, linear: list[str]) -> list[str]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    modules = dict(model.named_modules())
    return [name for name in linear if id(modules[name]) in inside] or linear


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _by_expression(linear: list[str], expression: str) -> list[str]:
    patterns = Patterns("growth.target_modules")  # a run's own configuration may be anybody's
    try:
        re.compile(expression)
    except re.error as error:
        raise QaromaError(
            f"got target modules '{expression}'; expected a name or a regular expression ({error}). Type: {_ALL}"
        ) from error
    return [name for name in linear if patterns.fullmatch(expression, name)]


def _nothing_to_adapt(model: Any) -> str:
    kind = type(model).__name__
    if _fused_experts(model):
        return f"{kind} keeps its weights in fused experts, which cannot be adapted. Name another base with --model"
    return f"{kind} has no linear layers to adapt; expected at least one. Name another base with --model"


def _why_not(model: Any, target: str, linear: list[str]) -> str:
    """Explain why a target takes no adapter: because of what it is, or because there is nothing of that name."""
    if any(_matches(name, target) for name in _fused_experts(model)):
        return f"'{target}' is a fused expert weight, which cannot be adapted. Type: {_ALL}"
    for name, module in model.named_modules():
        if _matches(name, target):
            if module in _head(model):
                return f"'{target}' is the output head, which is not adapted. Type: {_ALL}"
            if name in uncalled_layers(model):
                return f"'{target}' is never called, only its weight is used: an adapter has no effect. Type: {_ALL}"
            return f"'{target}' is of type {type(module).__name__}; expected a linear layer. Type: {_ALL}"
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    near = difflib.get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.5)
    near = near or difflib.get_close_matches(target, linear, n=3, cutoff=0.6)
    expected = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(ends[:12])}"
    return f"No linear layer is called '{target}'; {expected}. Type: --set growth.target_modules={(near or ends)[0]}"
