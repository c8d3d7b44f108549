"""Errors that mean that memory is out, whatever their name."""

from __future__ import annotations

import re

import torch

# A library of kernels, pinned host memory and a card that one program holds alone have no error of their own for it.
_CARD = re.compile(r"CUDA error: out of memory|CUDA out of memory|CU(?:BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED")
_HOST = re.compile(r"can't allocate memory|not enough memory")


def card_is_full(error: BaseException) -> bool:
    """Whether an error says that a card, or host memory that is pinned for it, has none left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CARD.search(str(error)) is not None


def host_is_full(error: BaseException) -> bool:
    """Whether an error says that the computer has no memory left."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _HOST.search(str(error)) is not None
