"""Activation checkpointing, with the layers' inputs kept on the device or in host memory.

A decoder layer keeps only its input; the rest is computed again in the backward pass. With offload
that input waits in pinned host memory: copied out while the next layer computes, and copied back one
layer ahead of its use, so that two of them are on the device at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qaroma.engine.host import THIS_HOST, Host, Parking, aligned
from qaroma.model.layers import decoder_layers


class _Streams:
    """The two that copies run on beside what a device computes: out to the host, and back."""

    def __init__(self, device: torch.device) -> None:
        self.out: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.back: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying_out(self, tensor: Tensor) -> AbstractContextManager[None]:
        """Inside, a tensor's copies are queued, to memory that a way back which nothing waited for may be reading."""
        self.out.wait_stream(torch.cuda.current_stream(tensor.device))
        self.out.wait_stream(self.back)
        tensor.record_stream(self.out)
        return torch.cuda.stream(self.out)

    def copying_back(self) -> AbstractContextManager[None]:
        """Inside, copies of what has been copied out are queued."""
        self.back.wait_stream(self.out)
        return torch.cuda.stream(self.back)

    def arrived(self, tensor: Tensor) -> None:
        """For all that is queued from here on a tensor that was copied back is there."""
        current = torch.cuda.current_stream(tensor.device)
        current.wait_stream(self.back)
        tensor.record_stream(current)


class _Parked:
    """One layer's input on the host, and its way back.

    Args:
        tensor: the input, on a device apart from the host.
        parking: where it waits.
        streams: that copies run on; None where they run in order.
        previous: of the layer before, whose turn comes after this one's.
    """

    def __init__(self, tensor: Tensor, parking: Parking, streams: _Streams | None, previous: _Parked | None) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.parking, self.streams, self.previous = parking, streams, previous
        self.returning: Tensor | None = None
        self.place: int | None = None
        tensor = tensor.contiguous()
        self.place, self.pieces = parking.enter(tensor.nbytes, self.device)
        with streams.copying_out(tensor) if streams else nullcontext():
            for waiting, part in self._parts_of(tensor):
                waiting.copy_(part, non_blocking=True)

    def fetch(self) -> None:
        """Begin the copy back."""
        if self.returning is not None or self.place is None:
            return
        with self.streams.copying_back() if self.streams else nullcontext():
            self.returning = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for waiting, part in self._parts_of(self.returning):
                part.copy_(waiting, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor on its device again; the layer before it is fetched meanwhile."""
        self.fetch()
        tensor = self.returning
        assert tensor is not None
        if self.streams is not None:
            self.streams.arrived(tensor)
        if self.previous is not None:
            self.previous.fetch()
        self.leave()
        return tensor

    def leave(self) -> None:
        """Give up the place."""
        if self.place is not None:
            self.parking.leave(self.place)
        self.returning = self.previous = self.place = None
        self.pieces = []

    def __del__(self) -> None:  # as when a step fails, whose backward pass takes no more
        self.leave()

    def _parts_of(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces on the host, each with the bytes of a tensor that belong there."""
        parts = torch.split(tensor.view(-1).view(torch.uint8), [len(piece) for piece in self.pieces])
        return zip(self.pieces, parts, strict=True)


class OffloadedInputs:
    """Hooks that keep the layers' inputs in host memory between forward and backward pass.

    Args:
        layers: of the model.
        host: whose memory they wait in.
    """

    def __init__(self, layers: int, host: Host = THIS_HOST) -> None:
        self.layers, self.host, self.parking = layers, host, Parking(host)
        self._last: _Parked | None = None
        self._streams: _Streams | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_floating_point() or tensor.numel() == 0 or not self.host.is_apart(tensor.device):
            return tensor
        if tensor.is_cuda and self._streams is None:
            self._streams = _Streams(tensor.device)
        if not tensor.requires_grad:  # the first layer's input, which depends on nothing trained, begins a new chain
            self._last = None
            self.parking.reserve(self.layers * aligned(tensor.nbytes), tensor.device)
        self._last = _Parked(tensor, self.parking, self._streams, self._last)
        return self._last

    def unpack(self, kept: Tensor | _Parked) -> Tensor:
        return kept.take() if isinstance(kept, _Parked) else kept


def enable_checkpointing(model: Any, *, offload: bool = False, host: Host = THIS_HOST) -> None:
    """Recompute every decoder layer in the backward pass.

    Args:
        model: transformers model; its layers say themselves where a checkpoint begins.
        offload: keep the layers' inputs in host memory; on a CPU nothing moves.
        host: whose memory they wait in.
    """
    inputs = OffloadedInputs(len(decoder_layers(model)), host) if offload else None

    def run(function: Callable[..., Any], *args: Any) -> Any:
        if inputs is None:
            return checkpoint(function, *args, use_reentrant=False)
        with saved_tensors_hooks(inputs.pack, inputs.unpack):
            return checkpoint(function, *args, use_reentrant=False)

    # The public switch takes options of torch's checkpoint, but no other function in its place.
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)


def disable_checkpointing(model: nn.Module) -> None:
    """Keep every activation again."""
    model._set_gradient_checkpointing(enable=False)  # type: ignore[operator]
