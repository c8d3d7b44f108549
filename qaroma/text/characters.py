"""Characters: which texts can be written to a file, and how many a value has."""

from __future__ import annotations

from typing import Any

_A_NUMBER = 20  # characters of what is neither text nor a list


def is_unicode(text: str) -> bool:
    """Whether a text is whole: half a surrogate pair, as of a file name in another encoding, has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def weight(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters of a value as text, those of lists in lists included; what stands in it twice counts twice."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 5
    if not isinstance(value, (list, tuple, dict)):
        return _A_NUMBER
    known = {} if known is None else known
    found = known.get(id(value))
    if found is None:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        found = known[id(value)] = 2 + sum(4 + weight(part, known) for part in parts)
    return found
