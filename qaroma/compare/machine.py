"""One line about the machine that a run was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def hardware(device: str) -> str:
    """Processor or GPU, and torch's version.

    Args:
        device: the configuration's ``training.device``.
    """
    software = f"torch {version('torch')}, transformers {version('transformers')}"
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name()}, {software}"
    threads = os.environ.get("OMP_NUM_THREADS")
    used = f" ({threads} used)" if threads else ""
    return f"{_processor()}, {os.cpu_count()} logical cores{used}, {software}"


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
