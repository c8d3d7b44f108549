"""Calls of native code with an end: a library that was asked too much is no longer waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

_LOOK = 0.05  # seconds between two looks at the memory


class BeyondBounds(Exception):
    """The call took too long or too much; its text says which."""


def bounded_call(work: Callable[[], T], *, seconds: float, memory: int) -> T:
    """What a function returns that spends its time without the interpreter's lock.

    Nothing stops native code, so it runs in a thread, which is left alone where it goes too far. A command ends
    with its sentence then, and the thread with it.

    Args:
        work: the call.
        seconds: that it may take.
        memory: bytes by which this process may grow meanwhile.

    Raises:
        BeyondBounds: it took more, or the library broke down (a panic of Rust's is no Exception).
        Exception: whatever the call raises.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = Thread(target=run, daemon=True)
    process, end = psutil.Process(), time.monotonic() + seconds
    before = process.memory_info().rss
    thread.start()
    thread.join(_LOOK)
    while thread.is_alive():
        if time.monotonic() > end:
            raise BeyondBounds(f"it takes more than {seconds:.0f} seconds")
        if process.memory_info().rss - before > memory:
            raise BeyondBounds(f"it takes more than {memory >> 20} MiB of memory")
        thread.join(_LOOK)
    value, error = outcome[0]
    if error is None:
        return value  # type: ignore[no-any-return]
    if panicked(error):
        raise BeyondBounds(str(error)) from error
    raise error


def panicked(error: BaseException) -> bool:
    """Whether an exception is a panic of a library in Rust, which Python's ``except Exception`` lets pass."""
    return type(error).__name__ == "PanicException"
