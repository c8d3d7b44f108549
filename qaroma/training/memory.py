"""How much memory a run takes, as its metrics report it."""

from __future__ import annotations

import psutil
import torch


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU, or the resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
