"""An operation's input, and what was made of it, saved for the backward pass before the operation runs.

Under activation checkpointing a layer is computed again only as far as the last tensor that its backward pass
asks for, and what a function of autograd saves counts from the end of its forward on. Saved by an operation of
its own, the input of a layer's last product is there without the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeptInput:
    """Where the operation that saves an input and the one that uses it meet."""

    context: Any = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The input and what was saved with it, in the backward pass."""
        return self.context.saved_tensors  # type: ignore[no-any-return]


def keep_input(x: Tensor, *made: Tensor) -> tuple[Tensor, KeptInput]:
    """Save a tensor for the backward pass of whatever is given the result.

    Args:
        x: must require a gradient, or autograd saves nothing.
        made: of it, without a gradient, saved with it.

    Returns:
        ``x`` for that operation to compute with, and where its backward pass finds what was saved.
    """
    kept = KeptInput()
    return _Keep.apply(x, kept, *made), kept  # type: ignore[no-untyped-call]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: KeptInput, *made: Tensor) -> Tensor:
        ctx.save_for_backward(x, *made)
        kept.context = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)
