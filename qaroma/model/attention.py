"""Attention with fewer key heads than query heads where SDPA's fused kernels want as many.

SDPA's flash kernel takes grouped key heads, in 16 bits and from RTX 30 on; the memory-efficient one, which all other
cards, fp32 and the wheels for Windows have, does not, and SDPA falls back to a product with L x L matrices.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.model.documents import REPEATED, attend, head_size


def fused_for_groups(device: torch.device, dtype: torch.dtype, width: int = 64) -> bool:
    """Whether a fused kernel of SDPA runs there with fewer key heads than query heads, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key = (torch.ones(1, heads, 16, width, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2))
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    try:
        with sdpa_kernel(fused):
            output = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
            output.sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True


def wants_repeated_keys(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's key heads are to be repeated on a device; on a CPU, whose kernel takes groups, never.

    Args:
        config: transformers' configuration of the model.
        device, dtype: of its arithmetic.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    groups = heads is not None and (getattr(text, "num_key_value_heads", None) or heads) < heads
    if device.type != "cuda" or not groups:
        return False
    return not fused_for_groups(device, dtype, head_size(config))


def repeat_keys(model: Any) -> None:
    """Let a model that computes attention by SDPA repeat its key heads first; another one is left alone.

    Args:
        model: a transformers model; changed in place.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(REPEATED, _repeated)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)
    model.set_attn_implementation(REPEATED)
    if model.config._attn_implementation != REPEATED:
        raise QaromaError(
            f"{type(model).__name__} does not let its attention be set. Type: --set model.attention=eager"
        )


def _repeated(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """:func:`~qaroma.model.documents.attend`, as if every query head had a key head of its own."""
    from transformers.integrations.sdpa_attention import repeat_kv

    count = query.shape[1] // key.shape[1]
    alone = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True))
    return attend(alone, query, repeat_kv(key, count), repeat_kv(value, count), attention_mask, **options)
