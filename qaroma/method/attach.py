"""Putting an adapter on a model."""

from __future__ import annotations

import torch
from torch import nn

from qaroma.method.adapter import Adapter
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
