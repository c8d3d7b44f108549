"""Reading a row's fields, and remembering which of them nobody asked for."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from qaroma.text.json_text import parse_json

_OF_TURNS = {"role", "from", "messages"}  # a turn has one of these, or a list of them is under the last


class BadRow(Exception):
    """A row that cannot be trained on; its text says why, without the place."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class Fields:
    """A row's or a turn's fields by their names, whatever the case and the space around them.

    Args:
        value: the fields as they were read.
    """

    def __init__(self, value: Mapping[str, Any]) -> None:
        self._given = value
        self._names = {str(name).strip().lower(): name for name in value}
        self._names.update({name: name for name in value})  # an exact name goes before one that is like it
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.peek(name) is not None

    def stands(self, name: str) -> bool:
        """Whether a field is there, null or not."""
        return name in self._names

    @property
    def names(self) -> list[str]:
        """The names as they were given."""
        return [printable(str(name)) for name in self._given]

    def peek(self, name: str) -> Any:
        """A field without taking note of it; None where it is missing."""
        return self._given.get(self._names.get(name, name))

    def get(self, *names: str) -> Any:
        """The first of some fields that holds something, None where none does; it counts as asked for."""
        for name in names:
            if name in self:
                self._asked.add(self._names[name])
                return self.peek(name)
        return None

    def name(self, *names: str) -> str:
        """Which of some fields :meth:`get` would give, as it was named; the first where it would give none."""
        return next((str(self._names[name]) for name in names if name in self), names[0])

    def ignored(self) -> list[str]:
        """The names of the fields that hold something and were not asked for."""
        nothing: tuple[Any, ...] = (None, "", [], {})
        left = [str(name) for name, value in self._given.items() if name not in self._asked and value not in nothing]
        return [printable(name) for name in left]


def printable(text: str) -> str:
    """A text with halves of surrogate pairs, which no terminal takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def optional_text(fields: Fields, *names: str) -> str:
    """A text field that may be missing, null or blank, and is then the empty string.

    Raises:
        BadRow: it is no text.
    """
    content = fields.get(*names)
    if content is not None and not isinstance(content, str):
        raise BadRow(f"the field '{fields.name(*names)}' is {kind_of(content)}; expected text")
    return content if content and content.strip() else ""


def text(fields: Fields, *names: str) -> str:
    """A text field that must say something.

    Raises:
        BadRow: it is missing, blank or no text.
    """
    content = optional_text(fields, *names)
    if not content:
        name = fields.name(*names)
        raise BadRow(f"the field '{name}' is {'blank' if name in fields else 'missing'}")
    return content


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing"
    names = {"str": "text", "int": "a number", "float": "a number", "bool": "true/false", "dict": "an object"}
    return "an empty list" if value == [] else names.get(type(value).__name__, f"a {type(value).__name__}")


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many of their first elements two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def parsed_cell(cell: Any) -> Any:
    """What was written into a cell of a table as JSON or as Python prints it; anything else as it is."""
    if not (isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{")):
        return cell
    try:
        return parse_json(cell)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return cell
    return value if isinstance(value, list | dict) else cell


def turns_cell(cell: Any) -> Any:
    """As :func:`parsed_cell` where that gives turns; a text that happens to be JSON is a text."""
    value = parsed_cell(cell)
    turns = value if isinstance(value, list) else [value]
    are_turns = turns and all(isinstance(turn, Mapping) and _OF_TURNS & turn.keys() for turn in turns)
    return value if are_turns else cell
