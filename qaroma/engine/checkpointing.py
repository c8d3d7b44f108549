"""Activation checkpointing, with the layers' inputs kept on the device or in host memory.

A decoder layer keeps only its input; the rest is computed again in the backward pass. With offload
that input waits in pinned host memory: copied out while the next layer computes, and copied back one
layer ahead of its use, so that two of them are on the device at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class ToHost(Protocol):
    """The way by which tensors leave the device: :func:`to_host`, or one that takes note of them."""

    def __call__(self, tensor: Tensor, stream: Any = None, *, pinned: bool = True) -> Tensor: ...


def to_host(tensor: Tensor, stream: Any = None, *, pinned: bool = True) -> Tensor:
    """A copy in host memory.

    Args:
        tensor: on a GPU; a CPU tensor is returned as it is, since it lies in host memory already.
        stream: CUDA stream to copy on, behind what the current one has queued; None copies in order.
        pinned: in memory that the card reads and writes by itself, of which torch takes powers of two.

    Returns:
        CPU tensor, valid when ``stream`` has come so far.
    """
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        if stream is None:
            return host.copy_(tensor)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return host
    return tensor


class _Parked:
    """One layer's input on the host, and its way back."""

    def __init__(
        self, tensor: Tensor, streams: tuple[Any, Any] | None, previous: _Parked | None, copy_out: ToHost
    ) -> None:
        self.device, self.streams, self.previous = tensor.device, streams, previous
        self.host: Tensor | None = copy_out(tensor, streams[0] if streams else None)
        self.copied = self.host is not tensor
        self.returning: Tensor | None = None

    def fetch(self) -> None:
        """Begin the copy back."""
        if self.returning is not None or self.host is None:
            return
        if self.streams is None:
            self.returning = self.host.clone() if self.copied else self.host
            return
        out, back = self.streams
        back.wait_stream(out)  # the copy to the host must have ended
        with torch.cuda.stream(back):
            self.returning = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor on its device again; the layer before it is fetched meanwhile."""
        self.fetch()
        if self.streams is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.streams[1])
        if self.previous is not None:
            self.previous.fetch()
        tensor, self.returning, self.host, self.previous = self.returning, None, None, None
        assert tensor is not None
        if self.streams is not None:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor


class OffloadedInputs:
    """Hooks that keep the layers' inputs in host memory between forward and backward pass.

    Args:
        copy_out: brings them there.
    """

    def __init__(self, copy_out: ToHost = to_host) -> None:
        self.copy_out = copy_out
        self._last: _Parked | None = None
        self._streams: tuple[Any, Any] | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        if tensor.is_cuda and self._streams is None:
            streams = (torch.cuda.Stream(tensor.device), torch.cuda.Stream(tensor.device))  # type: ignore[no-untyped-call]
            self._streams = streams
        # The first layer's input does not depend on anything trained and begins a new chain.
        self._last = _Parked(tensor, self._streams, self._last if tensor.requires_grad else None, self.copy_out)
        return self._last

    def unpack(self, kept: Tensor | _Parked) -> Tensor:
        return kept.take() if isinstance(kept, _Parked) else kept


def enable_checkpointing(model: Any, *, offload: bool = False, copy_out: ToHost = to_host) -> None:
    """Recompute every decoder layer in the backward pass.

    Args:
        model: transformers model; its layers say themselves where a checkpoint begins.
        offload: keep the layers' inputs in host memory; on a CPU nothing moves.
        copy_out: brings them there.
    """
    inputs = OffloadedInputs(copy_out) if offload else None

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
