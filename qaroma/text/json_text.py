"""JSON whose every fault is a ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str, **options: Any) -> Any:
    """As :func:`json.loads`.

    Args:
        text: the document.
        options: of the same.

    Raises:
        ValueError: no JSON, a number of thousands of digits, or values nested about a thousand deep.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
