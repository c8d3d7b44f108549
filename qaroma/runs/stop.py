"""Ctrl-C as a request: the first one asks to stop at the next good moment, the second one ends at once.

SIGTERM asks, however often it comes: Slurm sends it to all processes of a job, and torchrun among them passes it on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any


class StopRequest:
    """Turns SIGINT (and SIGTERM, as a scheduler sends it) into a flag while it is entered.

    Outside the main thread, where no signal can be caught, it does nothing.

    Args:
        signals: that ask for the stop.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.requested = False
        self._signals = signals
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
