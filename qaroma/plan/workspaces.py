"""Memory that kernels take inside themselves, which no count of tensors can see.

The constants are to be measured on a GPU, by ``torch.cuda.max_memory_allocated`` beside the planned
peak at 2,048 and at 8,192 tokens. Not measured: no GPU. Zero until then, which ``qaroma plan`` says.
"""

from __future__ import annotations

from typing import Any

import torch

# Bytes that the library of matrix products keeps from its first one on.
FIXED = 0

# Bytes for each element of the queries while attention's backward pass runs. By its source FlashAttention-2
# takes 4, where it sums their gradient in fp32, and with fewer key heads than query heads another 4, where it
# holds the gradients of keys and values for each query head.
ATTENTION_BACKWARD = 0.0

_ATTENTION_BACKWARD_OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What an operation takes while it runs, beside its result.

    Args:
        func: the operation, as a ``TorchDispatchMode`` is given it.
        args: its positional arguments.
    """
    if func is _ATTENTION_BACKWARD_OP:
        query = args[1]
        return int(ATTENTION_BACKWARD * query.numel())
    return 0


def workspaces_measured() -> bool:
    """Whether the constants say anything yet."""
    return bool(FIXED or ATTENTION_BACKWARD)
