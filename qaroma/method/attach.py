"""Putting an adapter on a model, and taking it off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qaroma.errors import QaromaError
from qaroma.method.adapter import AdaptedLinear, Adapter
from qaroma.method.dequantise import layer_shape
from qaroma.method.factors import Update
from qaroma.method.linear import has_matrix
from qaroma.method.targets import find_targets


def attach(
    model: nn.Module,
    targets: str | list[str] = "all-linear",
    *,
    inner_rank: int = 1,
    alpha: float = 2.0,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Adapter:
    """Replace a model's linear layers by adapted ones and freeze everything else.

    The model's outputs do not change. Give the result to a
    :class:`~qaroma.method.aroma.GrowthController`, which begins the first components.

    Args:
        model: as :func:`qaroma.load_base` returns it, or any transformers model; changed in place.
        targets: ``all-linear``, or names, name suffixes, or one regular expression.
        inner_rank: rank r of one component.
        alpha: the update is alpha / r times B A.
        dropout: before A, on the active component only.
        dtype: compute dtype of the factors; None is each layer's own.
        seed: of the initial values.

    Raises:
        QaromaError: a target that the model does not have, or none that can be adapted.
    """
    names = find_targets(model, targets)
    return Adapter(model, names, inner_rank=inner_rank, alpha=alpha, dropout=dropout, dtype=dtype, seed=seed)


def attach_update(model: nn.Module, update: Update) -> Adapter:
    """Put an update on a model as an adapter of frozen components, one a module.

    Args:
        model: its own, without an adapter; changed in place.
        update: modules of rank 0 are adapted too.
    """
    adapter = Adapter(model, update)
    for name, factors in update.items():
        adapter.layers[name].load_factors(*factors, [factors.rank] if factors.rank else [])
    return adapter


def detach(adapter: Adapter) -> None:
    """Take an adapter off its model: the layers are its base's again."""
    model: Any = adapter.model
    for name, layer in adapter.layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(M, N) of every layer of a model that an adapter may hold, by its full name.

    Args:
        model: dense or in 4 bits, on any device, with an adapter on it or not.
    """
    shapes = {name: layer_shape(module) for name, module in model.named_modules() if _is_adaptable(module)}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or has_matrix(module)


def check_shapes(update: Update, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse an adapter that is not this model's.

    Args:
        update: the adapter's.
        shapes: as :func:`linear_shapes` gives them for the model.
        where: the adapter's folder, for the message.

    Raises:
        QaromaError: a module that the model lacks, or one of another shape.
    """
    for name, factors in update.items():
        if name not in shapes:
            raise QaromaError(f"{where} adapts {name}, which this model does not have; give the base it was trained on")
        if factors.shape != shapes[name]:
            ours, theirs = (f"{rows} x {columns}" for rows, columns in (factors.shape, shapes[name]))
            raise QaromaError(
                f"{where} has {name} of {ours}, this model's is {theirs}; give the base it was trained on"
            )
