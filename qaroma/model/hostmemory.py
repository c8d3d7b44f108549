"""Making the C library give memory back while a model is loaded."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None


class FreedMemoryGoesBack(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, what quantising a weight has freed goes back to the system at once.

    It frees several large temporaries for each small result it keeps. glibc soon puts such blocks on
    its heap (its threshold for mapping a block follows what was freed, up to 32 MB), where every kept
    result leaves a hole that the next temporary does not quite fit: loading SmolLM2-135M took up to
    850 MB in place of 360, differently from run to run. So the heap's free pages are returned after
    each call of bitsandbytes (malloc_trim(3)). The thresholds are left alone: one that is set once
    (mallopt(3)) does not follow what is freed any more, and training, which frees and takes the same
    sizes again and again, would pay for it. Other C libraries are left alone, too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._library = _glibc()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._library is not None and func.namespace == "bitsandbytes":
            self._library.malloc_trim(0)
        return result
