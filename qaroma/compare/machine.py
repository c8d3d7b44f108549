"""One line about the machine that a run was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from qaroma.errors import QaromaError


def hardware(device: str, card: int = 0) -> str:
    """Processor or GPU, and torch's version.

    Args:
        device: the configuration's ``training.device``.
        card: which GPU, as torch counts them.
    """
    software = f"torch {version('torch')}, transformers {version('transformers')}"
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name(card)}, {software}"
    threads = os.environ.get("OMP_NUM_THREADS")
    used = f" ({threads} used)" if threads else ""
    return f"{_processor()}, {os.cpu_count()} logical cores{used}, {software}"


def one_card_each(gpus: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of so many processes that get a GPU of their own, in torch's order.

    Raises:
        QaromaError: there are not as many.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > there:
        sees = f"{there} GPU{'s' if there > 1 else ''}" if there else "no GPU"
        instead = f"Type: --gpus {there}" if there else "Leave it out: runs then follow each other on the CPU"
        raise QaromaError(f"got --gpus {gpus}, but torch sees {sees} here. {instead}")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")  # ours then are some of those
    names = named.split(",") if named else map(str, range(there))
    return [name.strip() for name in names][:gpus]


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
