"""Attention of packed rows: each document as if it were alone, without an L x L mask.

A row of L tokens holds several documents. A mask that keeps them apart has L x L values, keeps SDPA from its flash
kernel, and computes what it throws away. Here transformers' own attention runs on one document after the other, or a
kernel for many lengths on all of them.

Dimensions: B rows, L tokens of a row, T tokens of all rows, N documents in them, H query heads, G key heads, D width
of a head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qaroma.model.devices import to_device

APART = "sdpa_apart"  # transformers' name of SDPA that knows documents
REPEATED = "sdpa_repeated"  # and of the one that repeats key heads as well (:mod:`qaroma.model.attention`)
WIDEST = 256  # head of flash kernels


@dataclass(frozen=True)
class Documents:
    """Stands where a layer expects the mask of packed rows.

    Attributes:
        lengths: of the documents of all rows, one after the other.
        masks: for each, what transformers masks in it beside the future: (1, 1, its length, its length), or None.
        starts: (N + 1,) int32, where each begins and the last one ends, on the device; None where no kernel takes them.
    """

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]
    starts: Tensor | None


@contextmanager
def documents_told(lengths: Sequence[int]) -> Iterator[None]:
    """Inside, a model that :func:`keep_documents_apart` changed takes its rows for documents of these lengths.

    Args:
        lengths: of the documents of all rows, padding included; they add up to B L.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for name in (APART, REPEATED):
        AttentionMaskInterface.register(name, partial(_documents, tuple(lengths)))
    try:
        yield
    finally:
        for name in (APART, REPEATED):
            AttentionMaskInterface.register(name, sdpa_mask)


def knows_documents(model: Any) -> bool:
    """Whether a model's attention asks for :func:`documents_told`."""
    return model.config._attn_implementation in (APART, REPEATED)


def keep_documents_apart(model: Any) -> None:
    """Let a model that computes attention by SDPA know documents; another one is left alone.

    Args:
        model: a transformers model; changed in place.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation == "sdpa" and _leaves_attention_to_us(model):
        AttentionInterface.register(APART, attend)
        AttentionMaskInterface.register(APART, sdpa_mask)
        model.set_attn_implementation(APART)


def _leaves_attention_to_us(model: Any) -> bool:
    """Whether its layers call what is registered, and do nothing to the mask that they do for SDPA alone."""
    code = inspect.getsource(sys.modules[type(model).__module__])
    return model._can_set_attn_implementation() and 'in ("eager", "sdpa")' not in code


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA; of packed rows for each document alone.

    Equivalent, but for rounding, to the whole rows with a mask that is true where query and key lie in one document.

    Args:
        module: the layer's attention.
        query: (B, H, L, D).
        key, value: (B, G, L, D) with H a multiple of G.
        attention_mask: :class:`Documents`, (B, 1, L, S), or None.
        options: as transformers passes them.

    Returns:
        (B, L, H, D), and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    documents: Any = attention_mask
    if not isinstance(documents, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    query_THD, key_TGD, value_TGD = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    if documents.starts is not None and query.shape[-1] == value.shape[-1] and not options.get("dropout"):
        longest, scale = max(documents.lengths), options.get("scaling")
        found_THD = _in_one_kernel(query_THD, key_TGD, value_TGD, documents.starts, longest, scale)
    else:
        split = (torch.split(t, list(documents.lengths)) for t in (query_THD, key_TGD, value_TGD))
        found_THD = torch.cat(
            [
                sdpa_attention_forward(module, *(t.transpose(0, 1)[None] for t in one), mask, **options)[0][0]
                for *one, mask in zip(*split, documents.masks, strict=True)
            ]
        )
    return found_THD.view(query.shape[0], -1, *found_THD.shape[1:]), None


def _in_one_kernel(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, starts: Tensor, longest: int, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if key_TGD.shape[1] != query_THD.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped = {"enable_gqa": True}  # torch 2.10 to 2.12 need not be told
    found: Any = varlen_attn(
        query_THD, key_TGD, value_TGD, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )
    return found  # type: ignore[no-any-return]


def head_size(config: Any) -> int:
    """Width of an attention head, by transformers' configuration of a model."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@cache
def one_kernel_for_all(device: torch.device, dtype: torch.dtype, width: int = 64) -> bool:
    """Whether torch has a kernel for sequences of many lengths that runs there, forward and backward.

    It is there for 16 bits, from RTX 30 on, in newer torch than the oldest that will do.

    Args:
        device, dtype: of the arithmetic.
        width: of a head.
    """
    if device.type != "cuda" or dtype == torch.float32 or width > WIDEST:
        return False
    query, key = (torch.ones(16, heads, width, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2))
    starts = torch.arange(0, 24, 8, device=device, dtype=torch.int32)
    try:
        _in_one_kernel(query, key, key, starts, 8, None).sum().backward()  # type: ignore[no-untyped-call]
    except (ImportError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _documents(lengths: tuple[int, ...], *, config: Any, device: torch.device, dtype: torch.dtype, **asked: Any) -> Any:
    """What transformers asks for as a mask: for each document the one that it would get alone."""
    from transformers.masking_utils import sdpa_mask

    alone = {**asked, "config": config, "device": device, "dtype": dtype, "batch_size": 1}
    masks = {
        length: sdpa_mask(**{**alone, "q_length": length, "kv_length": length}) for length in dict.fromkeys(lengths)
    }
    starts = None
    if not any(mask is not None for mask in masks.values()) and one_kernel_for_all(device, dtype, head_size(config)):
        starts = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    return Documents(lengths, tuple(masks[length] for length in lengths), starts)
