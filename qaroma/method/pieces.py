"""Rows worked on some at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Pieces(Protocol):
    """What rows are worked on one after the other: :func:`every_piece`, or fewer where the others are only counted.

    Args:
        rows, size: of all, and of one piece.
        first: so many pieces begin with less in memory than those after them, as what a loop sums is not there yet.
    """

    def __call__(self, rows: int, size: int, *, first: int = 0) -> Iterable[slice]: ...


def every_piece(rows: int, size: int, *, first: int = 0) -> Iterable[slice]:
    """Rows 0 .. ``rows``, so many at a time; the last piece has what is left."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
