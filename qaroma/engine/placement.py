"""Where the embeddings and the head lie: on the host, in 4 bits, or as they came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.engine.host import THIS_HOST, Host

PIECE = 8 * 2**20  # bytes of rows that are looked up, and copied to a device, at a time


class _Ferry:
    """Two pieces of pinned memory, one of which is filled while what lies in the other is copied to a device.

    The host fills neither again before the copy out of it has ended. Copies take their turn among what the device has
    to do, but the host waits for that only where one micro-batch has more rows than both pieces hold: the copy before
    the last is otherwise of a micro-batch that the device is done with, or at.

    Args:
        host: whose memory they are.
        device: where what is sent goes.
    """

    def __init__(self, host: Host, device: torch.device) -> None:
        self._pieces = [host.pinned_bytes(PIECE, device) for _ in range(2)]
        self._ended: list[Any] = []
        if device.type == "cuda":
            self._ended = [torch.cuda.Event(blocking=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def send(self, rows: Tensor, target: Tensor) -> None:
        """Queue a copy.

        Args:
            rows: on the host, at most :data:`PIECE` bytes.
            target: of their shape, on the device.
        """
        if self._ended:
            self._ended[0].synchronize()
        piece = self._pieces[0][: rows.nbytes].view(rows.dtype).view(rows.shape)
        target.copy_(piece.copy_(rows), non_blocking=True)
        if self._ended:
            self._ended[0].record(torch.cuda.current_stream(target.device))
        self._pieces.reverse()
        self._ended.reverse()


class HostEmbedding(nn.Module):
    """An embedding whose table stays in host memory: only the rows that are looked up travel.

    They go piece by piece, so that however many there are the host holds three pieces of :data:`PIECE` bytes: one that
    is looked up, and two of pinned memory on their way. The table is none of the model's parameters, the first of which
    tells transformers where a model computes.

    Args:
        inner: the embedding; moved to the host.
        device: where its output goes.
        host: where the table goes, and whose pinned memory its rows go through.

    Attributes:
        at_hand: ids of the pass to come, (B, L) on the host already; None where only the device has them.
    """

    at_hand: Tensor | None

    def __init__(self, inner: nn.Module, device: torch.device, host: Host = THIS_HOST) -> None:
        super().__init__()
        table: nn.Parameter = inner.weight  # type: ignore[assignment]
        inner.weight = nn.Parameter(host.copy_to_host(table.data, pinned=False), requires_grad=False)
        inner.to("cpu")
        self._unregistered, self.device, self.at_hand = (inner,), device, None
        self._ferry = _Ferry(host, device) if host.is_apart(device) else None

    @property
    def inner(self) -> nn.Module:
        return self._unregistered[0]

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) on any device -> (B, L, D) on the model's device."""
        ids = input_ids.to("cpu") if self.at_hand is None else self.at_hand
        if self._ferry is None:
            return self.inner(ids).to(self.device)  # type: ignore[no-any-return]
        row = self.inner(ids[:1, :1])[0, 0]  # by the module itself: some scale their rows, or normalise them
        found = torch.empty(*ids.shape, len(row), dtype=row.dtype, device=self.device)
        flat = (ids.reshape(1, -1), found.view(1, -1, len(row)))
        for part, target in zip(*(torch.split(t, PIECE // row.nbytes, 1) for t in flat), strict=True):
            self._ferry.send(self.inner(part), target)
        return found


@contextmanager
def ids_at_hand(model: Any, ids: Tensor | None) -> Iterator[None]:
    """Spare a model whose embeddings lie in host memory the wait for its ids to come back from the device.

    Args:
        model: transformers model; one whose embeddings lie elsewhere is left alone.
        ids: (B, L) on the host, what every pass inside is given on the device; None where they are not there.
    """
    embeddings = None if ids is None else model.get_input_embeddings()
    if not isinstance(embeddings, HostEmbedding):
        yield
        return
    embeddings.at_hand = ids
    try:
        yield
    finally:
        embeddings.at_hand = None


def move_embeddings_to_host(model: Any, host: Host = THIS_HOST) -> bool:
    """Put the input embeddings into host memory.

    Args:
        model: transformers model; changed in place.
        host: where the table goes.

    Returns:
        Whether it was done: not where the head shares the table and must have it on the device.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, HostEmbedding):
        return True
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        return False
    model.set_input_embeddings(HostEmbedding(embedding, compute_device(model), host))
    return True


def head_quantization(model: Any) -> str:
    """4-bit type of a model's output head, ``none`` where it is dense or where there is none (a classifier)."""
    head = model.get_output_embeddings()
    state = None if head is None else getattr(head.weight, "quant_state", None)
    return "none" if state is None else str(state.quant_type)


def quantise_head(model: Any, quant_type: str = "nf4", *, double_quantization: bool = True) -> None:
    """Put the output head into 4 bits; a table shared with the embeddings is no longer shared.

    Args:
        model: transformers model with a dense head; changed in place. A head in 4 bits stays as it is.
        quant_type: ``nf4`` or ``fp4``.
        double_quantization: quantise the constants too.
    """
    head = model.get_output_embeddings()
    if head is None or head_quantization(model) != "none":
        return
    import bitsandbytes as bnb

    weight = head.weight.detach()
    packed = bnb.nn.Linear4bit(
        head.in_features,
        head.out_features,
        bias=head.bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=double_quantization,
        quant_type=quant_type,
        device="meta",
    )
    packed.weight = bnb.nn.Params4bit(
        weight if weight.is_cuda else weight.clone(),  # on a card it is packed from where it lies: a copy may not fit
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=double_quantization,
        module=packed,
    ).to(weight.device)
    packed.support_avx512bf16_for_cpu = False
    if head.bias is not None:
        packed.bias = head.bias
    model.set_output_embeddings(packed.eval())


def compute_device(model: Any) -> torch.device:
    """Where a model computes: its head's device, since its embeddings and its layers may lie in host memory.

    A classifier's head is its last parameter.
    """
    head = model.get_output_embeddings()
    *_, last = model.parameters()
    device: torch.device = (last if head is None else head.weight).device
    return device
