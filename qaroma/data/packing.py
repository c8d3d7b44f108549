"""Several short examples in one row, so that no token of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

from qaroma.data.encode import Example


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Join examples into rows of at most ``max_length`` tokens (best fit, longest first).

    The sequences of a row do not see each other: their positions restart, and attention keeps within
    them. The first label of each is untrained already.

    Args:
        examples: none longer than ``max_length``.
        max_length: tokens of a row.

    Returns:
        Rows with ``lengths`` of the sequences in them; the same for the same examples.
    """
    rows: list[list[Example]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # free tokens -> rows
    rooms: list[int] = []  # the keys of by_room, ascending
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        needed = len(example.input_ids)
        place = bisect_left(rooms, needed)
        if place == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(example)
        left = room - needed
        if left:
            if left not in by_room:
                insort(rooms, left)
            by_room[left].append(row)
    return [_joined(row) for row in rows]


def _joined(members: Sequence[Example]) -> Example:
    weighted = any(e.loss_weights for e in members)
    weights = [w for e in members for w in e.loss_weights or [1.0] * len(e.labels)] if weighted else []
    return Example(
        [token for e in members for token in e.input_ids],
        [label for e in members for label in e.labels],
        origin=", ".join(e.origin for e in members[:3]) + (", ..." if len(members) > 3 else ""),
        loss_weights=tuple(weights),
        lengths=tuple(len(e.input_ids) for e in members),
    )
