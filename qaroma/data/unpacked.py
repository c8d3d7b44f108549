"""How much compressed data may come to: a megabyte of it can be a terabyte of the same letter.

Rows are kept in memory, so reading them piece by piece is not enough; what is not compressed comes to about its own
size.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qaroma.errors import QaromaError
from qaroma.text.bounded_calls import BeyondBounds, bounded_call
from qaroma.text.characters import weight

T = TypeVar("T")

_ALWAYS = 64 << 20  # bytes
_ROW = 100  # bytes of a record that holds nothing
_TIMES = 100  # text packs to a tenth, the most alike rows to some hundredth
_SECONDS, _BUFFERS = 60.0, 256 << 20


class Room:
    """What may still come out of a file or folder.

    Args:
        path: of the data.
    """

    def __init__(self, path: Path) -> None:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        self._path = path
        self._most = self._left = max(_ALWAYS, _TIMES * sum(file.stat().st_size for file in files))

    def take(self, size: int) -> None:
        """Count bytes that came out.

        Raises:
            QaromaError: they are too many.
        """
        self._left -= size
        if self._left < 0:
            raise self._too_much(f"comes to more than {self._most >> 20:,} MiB when it is unpacked")

    def take_row(self, row: dict[str, Any]) -> None:
        """As :meth:`take`, of a record."""
        self.take(weight(row) + _ROW)

    def bounded(self, work: Callable[[], T]) -> T:
        """What a call of a library in another language reads.

        Raises:
            QaromaError: it comes to too much, or takes too long.
        """
        try:
            return bounded_call(work, seconds=_SECONDS, memory=self._most + _BUFFERS)
        except BeyondBounds as error:
            raise self._too_much(f"cannot be unpacked ({error})") from error

    def _too_much(self, what: str) -> QaromaError:
        return QaromaError(
            f"'{self._path}' {what}, expected at most {_TIMES} times its size. Where that is right, write it as "
            ".jsonl that is not compressed"
        )


class Unpacked(io.RawIOBase):
    """A compressed file as it is read, within :class:`Room`.

    Args:
        stream: what unpacks it.
        path: of the file.
    """

    def __init__(self, stream: io.BufferedIOBase, path: Path) -> None:
        self._stream, self._room = stream, Room(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._stream.readinto(buffer)
        self._room.take(read)
        return read
