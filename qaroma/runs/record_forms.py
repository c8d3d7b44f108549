"""What the lines of ``metrics.jsonl`` must be to be counted, drawn and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LARGEST = 2**63  # a larger whole number fits neither a float nor any figure
# What each event must hold, by its name; None is an optimiser step. Other events are nobody's here.
_HOLDS: Mapping[str | None, Mapping[str, type]] = {
    None: {"step": int},
    "validation": {"step": int},
    "growth": {"step": int, "module": str, "component": int, "decision": str},
    "ranks": {"step": int, "ranks": dict},
    "answers": {"step": int},
    "samples": {"step": int},
}


def fault_of(record: Any) -> str | None:
    """What keeps a line from being read; None where nothing does.

    Args:
        record: a line's JSON value.
    """
    if not isinstance(record, dict):
        return "is no JSON object"
    event = record.get("event")
    if event is not None and not isinstance(event, str):
        return "has an event that is no name"
    for key, kind in _HOLDS.get(event, {}).items():
        if not _is(record.get(key), kind):
            return f"has no {key} as a run writes it"
    if event == "ranks" and not all(_is(rank, int) for rank in record["ranks"].values()):
        return "has a rank that is no whole number"
    large = [key for key, value in record.items() if isinstance(value, int) and abs(value) >= _LARGEST]
    return f"has a number out of range ({large[0]})" if large else None


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST
    return isinstance(value, kind)
