"""What maps each token by itself, over tiles of the sequence: its activations live for one tile at a time.

Two kinds of modules gain: a gated MLP, three and a half times as wide as its input, and an RMSNorm,
whose autograd keeps half a dozen fp32 copies of it.

Dimensions: T tokens of a micro-batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.method.kept_input import KeptInput, keep_input

TILE = 1024 * 4096  # values of a tile of the input: 1,024 tokens of an 8B model


def tile_tokenwise(model: nn.Module, tile: int = TILE) -> list[str]:
    """Run every gated MLP and every RMSNorm of a model tile by tile.

    Names stay as they are: only ``forward`` of the instance changes.

    Args:
        model: changed in place; a module that is tiled already stays so.
        tile: values of the input at a time; smaller inputs are not cut.

    Returns:
        Names of the modules found.
    """
    found = []
    for name, module in model.named_modules():
        # Phi-3 has gate and up in one layer; a block of fused experts has no down_proj module.
        widened = hasattr(module, "up_proj") or hasattr(module, "gate_up_proj")
        gated = widened and isinstance(getattr(module, "down_proj", None), nn.Module)
        if (gated or type(module).__name__.endswith("RMSNorm")) and not hasattr(module.forward, "tile"):
            run: Any = partial(tiled, module, module.forward, tile)
            run.tile = tile
            module.forward = run
            found.append(name)
    return found


def untile(model: nn.Module) -> None:
    """Undo :func:`tile_tokenwise`."""
    for module in model.modules():
        if hasattr(module.forward, "tile"):
            del module.forward


def tiled(module: nn.Module, forward: Callable[[Tensor], Tensor], tile: int, x: Tensor) -> Tensor:
    """``forward(x)`` for a module that maps each token by itself, with the activations of one tile.

    The backward pass runs each tile forward once more. Inside an activation checkpoint this costs no
    extra pass: the input is saved by an operation of its own, before the MLP runs, so that the
    checkpoint's recomputation stops there.

    Args:
        module: holds the parameters that train.
        forward: its own forward, (T, D) -> (T, D).
        tile: values of x at a time.
        x: (..., D).

    Returns:
        (..., D), equal to ``forward(x)`` up to the order of sums in the parameters' gradients.
    """
    if x.numel() <= tile:
        return forward(x)
    rows = max(1, tile // x.shape[-1])
    parameters = [p for p in module.parameters() if p.requires_grad]
    if (
        parameters and not x.requires_grad
    ):  # as in a first layer whose attention trains nothing: autograd would not save it
        x = x.detach().requires_grad_()
    x_TD, kept = keep_input(x.flatten(0, -2))
    y_TD: Tensor = _Tiled.apply(x_TD, kept, forward, rows, *parameters)  # type: ignore[no-untyped-call]
    return y_TD.view_as(x)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, kept: KeptInput, forward: Callable[[Tensor], Tensor], rows: int, *parameters: Tensor
    ) -> Tensor:
        ctx.kept, ctx.run, ctx.rows = kept, forward, rows
        y_TD = torch.empty_like(x_TD)
        for start in range(0, x_TD.shape[0], rows):
            y_TD[start : start + rows] = forward(x_TD[start : start + rows])
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD = ctx.kept.tensor
        grad_x = torch.empty_like(x_TD)
        for start in range(0, x_TD.shape[0], ctx.rows):
            tile = slice(start, start + ctx.rows)
            with torch.enable_grad():
                part = x_TD[tile].detach().requires_grad_()
                y = ctx.run(part)
            # Gradients of the parameters accumulate here, tile by tile, in their own buffers.
            torch.autograd.backward(y, grad_TD[tile])
            grad_x[tile] = part.grad
        unused = [None] * (len(ctx.needs_input_grad) - 4)
        return grad_x, None, None, None, *unused
