"""The card that is planned for: its memory, and what of it is kept free."""

from __future__ import annotations

import re

from qaroma.errors import QaromaError

CONTEXT = int(0.4 * 2**30)  # of a card's memory: what CUDA takes in a process before its first tensor
FRAGMENTS = int(0.25 * 2**30)  # what lies between tensors and fits none; of memory that was free beside the context
RESERVE = CONTEXT + FRAGMENTS  # of a whole card

PCIE = 25.0  # GB/s that copies from pinned memory reach over PCIe 4.0 x16, of 31.5 in each direction
TFLOPS = 124.0  # three quarters of the 165.2 in bf16 that NVIDIA's Ada whitepaper gives for an RTX 4090

_UNITS = {"": 2**30, "g": 2**30, "m": 2**20, "t": 2**40}


def parse_memory(text: str) -> int:
    """The bytes of a card as one would say it: ``8GiB``, ``8GB``, ``8`` or ``8192MiB``.

    GB counts as GiB: the 8 GB of a card's name are 8,192 MiB.

    Raises:
        QaromaError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gmt]?)i?b?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise QaromaError(f"got memory '{text}'; expected a size such as 8GiB or 8192MiB. Type: --vram 8GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def this_card() -> int | None:
    """The memory of this machine's GPU in bytes; None where it has none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
