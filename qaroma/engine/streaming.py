"""The base streamed: every decoder layer's matrices wait in host memory and come to the device when their turn is.

Two buffers lie on the device, one for the layers with even numbers and one for those with odd: a weight has
one place there for good, and its neighbours' places are never its own. While a layer computes, the next one
is copied on a stream of its own: in the forward pass the one after, in the backward pass the one before. With
recomputation a layer thus travels twice a step; the two at which the passes turn stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.engine.host import THIS_HOST, Host, aligned, piece_sizes
from qaroma.engine.placement import compute_device
from qaroma.model.layers import decoder_layers, layer_matrices, with_data


def constants_of(parameter: Tensor) -> Iterator[tuple[Any, str]]:
    """Where the quantisation constants of a 4-bit parameter are: object and attribute of each."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from ((state, name) for name in ("absmax", "code", "offset") if getattr(state, name) is not None)
        state = state.state2


def streamed_bytes(parameter: Tensor) -> int:
    """That a parameter and its constants take in a buffer."""
    tensors = [parameter, *(getattr(*place) for place in constants_of(parameter))]
    return sum(aligned(tensor.nbytes) for tensor in tensors)


class LayerStream:
    """Layers that wait in host memory, and the two buffers that they take turns in.

    Args:
        device: of the buffers.
        sizes: bytes of each layer.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        self.device = device
        largest = [max(sizes[side::2], default=0) for side in (0, 1)]
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in largest]
        self.waiting: list[list[Tensor]] = []  # of each layer its bytes, in pieces
        self._held: list[int | None] = [None, None]
        self._now: int | None = None
        self._copies: Any = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for buffer in self.buffers:  # whose memory is not given back while a layer is on its way
                buffer.record_stream(self._copies)

    @property
    def bytes(self) -> int:
        """In host memory."""
        return sum(piece.nbytes for pieces in self.waiting for piece in pieces)

    def add(self, parameters: Sequence[Tensor], host: Host) -> list[Tensor]:
        """Take the next layer: its bytes move to host memory.

        Args:
            parameters: frozen, wherever they lie; the constants of 4-bit ones go along.
            host: where the bytes go.

        Returns:
            Parameters for these ones' places, that view the layer's buffer.
        """
        number = len(self.waiting)
        buffer = self.buffers[number % 2]
        packed = torch.empty(sum(map(streamed_bytes, parameters)), dtype=torch.uint8, device=self.device)
        start = 0

        def moved(tensor: Tensor) -> Tensor:
            nonlocal start
            place = slice(start, start + tensor.nbytes)
            start += aligned(tensor.nbytes)
            packed[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            return buffer[place].view(tensor.dtype).view(tensor.shape)

        taken = []
        for parameter in parameters:
            visitor: Any = with_data(parameter, moved(parameter.detach()))
            for place in constants_of(parameter):
                setattr(*place, moved(getattr(*place)))
            visitor.ask = partial(self.ask, number)
            taken.append(visitor)
        self.waiting.append([host.copy_to_host(piece) for piece in torch.split(packed, piece_sizes(len(packed)))])
        return taken

    def ask(self, layer: int) -> None:
        """See to it that a layer is in its buffer for all that is queued from here on, and begin to fetch the next.

        Which one is next is a guess by the order of asking: a wrong one costs a wait, and no number.

        Args:
            layer: its number.
        """
        if layer == self._now:
            return
        self._fetch(layer)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        following = layer - 1 if self._now == layer + 1 else layer + 1
        self._now = layer
        if 0 <= following < len(self.waiting):
            self._fetch(following)

    def _fetch(self, layer: int) -> None:
        side = layer % 2
        if self._held[side] == layer:
            return
        self._held[side] = layer
        if self._copies is None:
            self._fill(self.buffers[side], layer)
            return
        # Whatever uses the layer that is there now has been queued before.
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            self._fill(self.buffers[side], layer)

    def _fill(self, buffer: Tensor, layer: int) -> None:
        start = 0
        for piece in self.waiting[layer]:
            buffer[start : start + len(piece)].copy_(piece, non_blocking=True)
            start += len(piece)


def stream_layers(model: Any, host: Host = THIS_HOST) -> LayerStream:
    """Stream a model's decoder layers from host memory.

    Their frozen matrices and the constants of these wait there; norms, biases and whatever trains stay. A
    module asks for its layer before it runs, and :func:`qaroma.method.dequantise.frozen_weight` whenever a
    weight is read: nothing else may read one. A backward pass has to compute each layer again, as it does
    under :func:`qaroma.engine.checkpointing.enable_checkpointing`.

    Args:
        model: transformers model, with or without an adapter on, its matrices on the host or on its device;
            changed in place.
        host: whose memory they wait in.

    Returns:
        The stream, which the model keeps too, as ``layer_stream``. Called again, the same.
    """
    known: LayerStream | None = getattr(model, "layer_stream", None)
    if known is not None:
        return known
    layers = [list(layer_matrices(layer)) for layer in decoder_layers(model)]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter, which several modules may share
    new: list[list[Tensor]] = []  # of each layer the parameters that no layer before it has
    for matrices in layers:
        new.append([])
        for module, name in matrices:
            parameter = getattr(module, name)
            if id(parameter) not in owners:
                new[-1].append(parameter)
            owners.setdefault(id(parameter), []).append((module, name))
    stream = LayerStream(compute_device(model), [sum(map(streamed_bytes, parameters)) for parameters in new])
    while new:
        parameters = new.pop(0)  # so that nothing here holds what has moved
        for parameter, visitor in zip(parameters, stream.add(parameters, host), strict=True):
            for module, name in owners[id(parameter)]:
                setattr(module, name, visitor)
                module.register_forward_pre_hook(partial(_ask_first, visitor.ask))  # type: ignore[attr-defined]
    model.layer_stream = stream
    return stream


def bytes_of_layers(model: nn.Module) -> int:
    """Host memory that :func:`stream_layers` takes."""
    places = (place for layer in decoder_layers(model) for place in layer_matrices(layer))
    parameters = {id(parameter): parameter for parameter in (getattr(*place) for place in places)}
    return sum(map(streamed_bytes, parameters.values()))


def _ask_first(ask: Callable[[], None], *_: Any) -> None:
    ask()
