"""Asking something that may never answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Answer(Generic[T]):
    """What a function returns, asked for at once and waited for no longer than one wants.

    Name resolution knows no timeout, hence the thread.

    Args:
        ask: called in a thread; what it raises counts as no answer.
    """

    def __init__(self, ask: Callable[[], T]) -> None:
        self._values: list[T] = []

        def run() -> None:
            with contextlib.suppress(Exception):  # whatever a proxy, a resolver or a TLS library raises
                self._values.append(ask())

        self._thread = Thread(target=run, daemon=True)
        self._thread.start()

    def get(self, seconds: float) -> T | None:
        """The value, or None where none came in time."""
        self._thread.join(seconds)
        return self._values[0] if self._values else None
