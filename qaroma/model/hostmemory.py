"""Making the C library give memory back while a model is loaded."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# mallopt's parameters and the highest values that glibc's own rule would reach (malloc.h, mallopt(3)).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_FIRST_THRESHOLD, _LAST_THRESHOLD = 128 << 10, 32 << 20


def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Let large blocks that are freed inside go back to the system at once.

    Quantising frees several large temporaries for each small result it keeps. glibc soon puts such
    blocks on its heap (its threshold for mapping a block follows what was freed, up to 32 MB), where
    every kept result leaves a hole that the next temporary does not quite fit: loading SmolLM2-135M in
    70 MB then took up to 570 MB, differently from run to run. Inside, the threshold is held at its
    first value; afterwards it stands where glibc's rule would have led, so that training, which
    frees and takes the same sizes again and again, pays nothing. Other C libraries are left alone.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _FIRST_THRESHOLD)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _LAST_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _LAST_THRESHOLD)
        library.malloc_trim(0)
