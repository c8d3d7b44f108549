"""Peaks of a process's own memory while something runs, in a process that is started for it. Linux's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
needs_rss_anon = pytest.mark.skipif(not STATUS.exists(), reason="RssAnon is Linux's")


@dataclass
class Peak:
    """``bytes`` above what the process held before."""

    bytes: int = 0


@contextmanager
def sampled_peak() -> Iterator[Peak]:
    """Memory without files that are mapped, looked at every millisecond."""
    peak, before, done = Peak(), _anonymous(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak.bytes = max(peak.bytes, _anonymous() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def run_measured(program: str, *arguments: str) -> str:
    """Run a program that can import the tests' modules; what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        # glibc keeps freed tensors below a threshold that it raises as it goes, as much as other processes let it.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    return result.stdout


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
