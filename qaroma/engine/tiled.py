"""What maps each token by itself, over tiles of the sequence: its activations live for one tile at a time.

Two kinds of modules gain: a gated MLP, three and a half times as wide as its input, and an RMSNorm,
whose autograd keeps half a dozen fp32 copies of it.

Dimensions: T tokens of a micro-batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qaroma.config.levels import FRAGMENTS
from qaroma.method.dequantise import weights_kept_dense
from qaroma.method.kept_input import KeptInput, keep_input
from qaroma.method.pieces import Pieces, every_piece

TILE = 1024 * 4096  # values of a tile of the input: 1,024 tokens of an 8B model


def tile_tokenwise(model: nn.Module, tile: int = TILE, pieces: Pieces = every_piece) -> list[str]:
    """Run every gated MLP and every RMSNorm of a model tile by tile.

    Names stay as they are: only ``forward`` of the instance changes.

    Args:
        model: changed in place; a module that is tiled already stays so.
        tile: values of the input at a time; smaller inputs are not cut.
        pieces: which tiles of an input are computed.

    Returns:
        Names of the modules found.
    """
    found = []
    for name, module in model.named_modules():
        # Phi-3 has gate and up in one layer; a block of fused experts has no down_proj module.
        widened = hasattr(module, "up_proj") or hasattr(module, "gate_up_proj")
        gated = widened and isinstance(getattr(module, "down_proj", None), nn.Module)
        if (gated or type(module).__name__.endswith("RMSNorm")) and not hasattr(module.forward, "tile"):
            run: Any = partial(tiled, module, module.forward, tile, pieces)
            run.tile = tile
            module.forward = run
            found.append(name)
    return found


def untile(model: nn.Module) -> None:
    """Undo :func:`tile_tokenwise`."""
    for module in model.modules():
        if hasattr(module.forward, "tile"):
            del module.forward


def tiled(module: nn.Module, forward: Callable[[Tensor], Tensor], tile: int, pieces: Pieces, x: Tensor) -> Tensor:
    """``forward(x)`` for a module that maps each token by itself, with the activations of one tile.

    The backward pass runs each tile forward once more. Inside an activation checkpoint this costs no
    extra pass: the input is saved by an operation of its own, before the MLP runs, so that the
    checkpoint's recomputation stops there.

    Args:
        module: holds the parameters that train.
        forward: its own forward, (T, D) -> (T, D).
        tile: values of x at a time.
        pieces: which tiles are computed.
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
    tiles = _Tiles(module, forward, rows, pieces)
    y_TD: Tensor = _Tiled.apply(x_TD, kept, tiles, *parameters)  # type: ignore[no-untyped-call]
    return y_TD.view_as(x)


class _Tiles(NamedTuple):
    """A module that maps each token by itself, so many ``rows`` at a time."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    rows: int
    pieces: Pieces

    def slices(self, x_TD: Tensor, *, first: int = 0) -> Iterable[slice]:
        """Tiles of an input; ``first`` as in :class:`~qaroma.method.pieces.Pieces`."""
        return self.pieces(x_TD.shape[0], self.rows, first=first)

    def one_pass(self, x_TD: Tensor) -> AbstractContextManager[None]:
        """Inside, where there is room, weights that were unpacked for a tile are there for the next."""
        return weights_kept_dense(self.module, partial(spare_bytes, x_TD.device))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, kept: KeptInput, tiles: _Tiles, *parameters: Tensor) -> Tensor:
        ctx.kept, ctx.tiles, ctx.random, ctx.parameters = kept, tiles, RandomState(x_TD.device), parameters
        y_TD = torch.empty_like(x_TD)
        with tiles.one_pass(x_TD):
            for tile in tiles.slices(x_TD):
                y_TD[tile] = tiles.forward(x_TD[tile])
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = ctx.kept.tensors
        grad_x = torch.empty_like(x_TD)
        # Added up here and not where they accumulate: a micro-batch's gradient is one sum, whatever stands there.
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        with ctx.random.again(), ctx.tiles.one_pass(x_TD):
            # A tile's output and gradients are there until the next one's are, and sums from the second tile on.
            for tile in ctx.tiles.slices(x_TD, first=2 if sums else 1):
                with torch.enable_grad():
                    part = x_TD[tile].detach().requires_grad_()
                    y = ctx.tiles.forward(part)
                grad_x[tile], *grads = torch.autograd.grad(y, (part, *ctx.parameters), grad_TD[tile], allow_unused=True)
                pairs = zip(sums, grads, strict=True)
                sums = [grad if total is None else total if grad is None else total + grad for total, grad in pairs]
        return grad_x, None, None, *sums


def spare_bytes(device: torch.device) -> int:
    """What a card could still give in whole pieces; nothing elsewhere, since a host's memory is not this program's."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device) - FRAGMENTS


class RandomState:
    """Where the random numbers of the host and of a device are, to be drawn again from there on.

    Args:
        device: that a module computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self._host = torch.get_rng_state()
        self._device = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, what was drawn from here on is drawn once more; afterwards all is as it was before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self._host)
            for device, state in zip(self.devices, self._device, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
