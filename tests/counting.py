"""Counts of what a step does."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Unpacked(TorchDispatchMode):
    """Counts the weights that are dequantised."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.bitsandbytes.dequantize_4bit.default
        return func(*args, **(kwargs or {}))
