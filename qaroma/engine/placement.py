"""Where the embeddings and the head lie: on the host, in 4 bits, or as they came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaroma.engine.checkpointing import ToHost, to_host


class HostEmbedding(nn.Module):
    """An embedding whose table stays in host memory: only the rows that are looked up travel.

    Args:
        inner: the embedding; moved to the host.
        device: where its output goes.
        copy_out: brings the table to the host.
    """

    def __init__(self, inner: nn.Module, device: torch.device, copy_out: ToHost = to_host) -> None:
        super().__init__()
        self.inner, self.device = inner, device
        table: nn.Parameter = inner.weight  # type: ignore[assignment]
        inner.weight = nn.Parameter(copy_out(table.data), requires_grad=False)
        inner.to("cpu")

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) on any device -> (B, L, D) on the model's device."""
        rows: Tensor = self.inner(input_ids.to("cpu"))
        return rows.to(self.device, non_blocking=True)


def move_embeddings_to_host(model: Any, copy_out: ToHost = to_host) -> bool:
    """Put the input embeddings into host memory.

    Args:
        model: transformers model; changed in place.
        copy_out: brings the table there.

    Returns:
        Whether it was done: not where the head shares the table and must have it on the device.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, HostEmbedding):
        return True
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        return False
    model.set_input_embeddings(HostEmbedding(embedding, compute_device(model), copy_out))
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
        weight.cpu() if weight.is_cuda else weight.clone(),
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
