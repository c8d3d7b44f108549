"""Memory that kernels take inside themselves, which no count of tensors can see.

Measured on a card by ``torch.cuda.max_memory_allocated`` around one operation (``pytest -m gpu``).
"""

from __future__ import annotations

from typing import Any

import torch

# Bytes that cuBLAS keeps from its first product on, for each thread that multiplies: the one of the forward pass and
# autograd's. torch asks for two pieces of 4 MiB and 16 of 8 KiB; for a Hopper it asks for 32 MiB.
FIXED = 2 * (2 * 4096 + 16 * 8) * 2**10

_GRAIN = 128  # positions, to a multiple of which FlashAttention-2 fills them up
_ATTENTION_BACKWARD_OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What an operation takes on a card while it runs, beside its result.

    FlashAttention-2's backward pass sums the gradient of the queries in fp32, holds a number for each query and head,
    and, with fewer key heads than query heads, the gradients of keys and values for each query head.

    Args:
        func: the operation, as a ``TorchDispatchMode`` is given it.
        args: its positional arguments.
    """
    if func is not _ATTENTION_BACKWARD_OP:
        return 0
    query_BHLD, key_BGLD = args[1], args[2]
    rows, heads, length, width = query_BHLD.shape
    filled = rows * heads * -(-length // _GRAIN) * _GRAIN
    repeated = 2 * query_BHLD.nbytes if key_BGLD.shape[1] < heads else 0
    return int(4 * filled * (width + 1) + repeated)
