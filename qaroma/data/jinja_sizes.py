"""How large what a chat template asks for would be, told before it is made.

One call of Python's can make gigabytes of a few bytes (``'a'.ljust(10 ** 10)``) or take for ever, and cannot be
interrupted. Each function here takes what the filter or method of its name takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from string import Formatter
from typing import Any

from qaroma.text.characters import weight

LARGEST = 1 << 24  # characters of a text or bits of a number, beyond any conversation
_PERCENT = re.compile(r"%(?:\(.*?\))?[-+ #0]*(\d+)?(?:\.(\d+))?[a-zA-Z%]")


def of_filter(name: str, *values: Any, **options: Any) -> int:
    """Characters that a filter makes, or as many as its time is worth; 0 where that is in proportion to its input."""
    return _FILTERS[name](*values, **options) if name in _FILTERS else 0


def of_method(owner: Any, name: str, *values: Any, **options: Any) -> int:
    """As :func:`of_filter`, of a method of a text or number."""
    if name in _METHODS:
        return _METHODS[name](owner, *values, **options)
    return max((abs(v) for v in (*values, *options.values()) if isinstance(v, int)), default=0)


def of_percent(text: str, values: Any) -> int:
    """Characters of ``text % values``."""
    if "*" in text:  # the width is a value
        return len(text) * _widest([values] if isinstance(values, int) else values)
    widths = [int(number or 0) for found in _PERCENT.findall(text) for number in found]
    return len(text) + text.count("%") * (weight(values) + max(widths, default=0))


def _format(text: str, *values: Any, **options: Any) -> int:
    """Of ``str.format``, whose fields may be used again and have widths that are fields too."""
    specs = "".join(spec or "" for _, _, spec, _ in Formatter().parse(text))
    width = max(map(int, re.findall(r"\d+", specs)), default=0)
    if "{" in specs:
        width += _widest([*values, *options.values()])
    return len(text) + text.count("{") * (max(map(weight, (*values, *options.values())), default=0) + width)


def _widest(values: Any) -> int:
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _padded(text: str, width: int = 80, fill: str = " ") -> int:
    return width


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    return weight(text) + (weight(text) // max(1, weight(old)) + 1) * weight(new)


def _joined(separator: Any, items: Any) -> int:
    return weight(items) + (len(items) if isinstance(items, Sized) else 0) * weight(separator)


def _indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    return weight(text) + (str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width))


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, *_: Any, **__: Any) -> int:
    deep = 0 if indent is None else _depth(value) * (indent if isinstance(indent, int) else weight(indent))
    return weight(value) * (1 + deep // 4)  # each item weighs four characters and more


def _depth(value: Any, known: dict[int, int] | None = None) -> int:
    if not isinstance(value, (list, tuple, dict)):
        return 0
    known = {} if known is None else known
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + max((_depth(part, known) for part in parts), default=0)
    return known[id(value)]


def _searched(text: Any, *values: Any) -> int:
    """From the right, and for any of several characters, Python looks at each place for each character."""
    return weight(text) * sum(weight(v) for v in values if isinstance(v, (str, bytes))) // 100


_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"), _searched),
    "expandtabs": lambda text, tabsize=8: weight(text) * abs(tabsize),
    "format": _format,
    "format_map": lambda text, values: _format(text, **values),
    "join": _joined,
    "replace": _replaced,
    "translate": lambda text, table: weight(text) * weight(table),
}
_FILTERS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "format": lambda text, *values, **options: of_percent(text, options or values),
    "indent": _indented,
    "join": lambda items, d="", attribute=None: _joined(d, items),
    "replace": _replaced,
    "round": lambda value, precision=0, method="common": 0 if abs(precision) < 100 else LARGEST + 1,
    "strftime_now": lambda form: 256 * weight(form),  # a function, whose buffer grows so far
    "string": weight,
    # Lists are copied once for each that is joined to them.
    "sum": lambda items, attribute=None, start=0: 0 if isinstance(start, int) else weight(items) * len(items) // 100,
    "tojson": _json,
    "trim": _searched,
}
