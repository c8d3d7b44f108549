"""JSON whose every fault is a ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """As :func:`json.loads`.

    Raises:
        ValueError: no JSON, a number of thousands of digits, or values nested about a thousand deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
