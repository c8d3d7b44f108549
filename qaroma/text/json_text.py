"""JSON whose every fault is a ValueError."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = (
    500  # values within each other; Python before 3.12 gives up at about a thousand, 3.12 and later far behind that
)


def parse_json(text: str, **options: Any) -> Any:
    """As :func:`json.loads`.

    Args:
        text: the document.
        options: of the same.

    Raises:
        ValueError: no JSON, a number of thousands of digits, or values nested deeper than :data:`DEEPEST`: what reads
            them afterwards would fail.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError:
        deep = True
    else:
        deep = text.count("[") + text.count("{") > DEEPEST and _is_deep(value)
    if deep:
        raise ValueError("its values are nested too deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [child for children in inner for child in children]
        if not level:
            return False
    return True
