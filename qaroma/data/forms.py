"""The forms of training data, and how a row of each becomes a conversation.

=============  ==========================================================================
alpaca         ``instruction``, ``output``; also ``input``, ``system``, ``history`` (pairs)
completion     ``prompt``, ``completion`` (or ``response``)
messages       ``messages``: turns with ``role`` and ``content``
sharegpt       ``conversations``: turns with ``from`` and ``value``; also ``system``
text           ``text``, or a .txt file: plain text, no question and answer
=============  ==========================================================================

Other keys are ignored. Each file is recognised by itself, so that sources of different forms mix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from qaroma.data.sources import Row
from qaroma.errors import QaromaError
from qaroma.foreign.json_text import parse_json

FORMS = ("alpaca", "completion", "messages", "sharegpt", "text")

_EXPECTED = (
    "messages; conversations; instruction and output; prompt and completion; or text. "
    "Rename the keys, or force a form with --data-format"
)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_SHOWN_BAD_ROWS = 10


class BadRow(Exception):
    """A row that cannot be trained on; its text says why, without the place."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass
class Parsed:
    """Rows of any forms as conversations and documents.

    Attributes:
        conversations: Pairs of a row and its turns; the last one is the assistant's.
        documents: Pairs of a row and its plain text.
        forms: The form of each file.
        bad: ``file:line: what is wrong``.
    """

    conversations: list[tuple[Row, list[Message]]] = field(default_factory=list)
    documents: list[tuple[Row, str]] = field(default_factory=list)
    forms: dict[str, str] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


def recognise(rows: Sequence[Row], forced: str = "auto") -> str:
    """The form of the rows of one file, by their keys.

    Args:
        rows: Rows of one file.
        forced: A form to use whatever the keys are, or ``auto``.

    Returns:
        One of ``FORMS``. Rows that fit no form do not count as long as others do.

    Raises:
        QaromaError: No row fits any form, or the rows are of two forms.
    """
    if forced != "auto":
        if forced not in FORMS:
            raise QaromaError(f"got the data format '{forced}'; expected auto, {', '.join(FORMS)}.")
        return forced
    first: dict[str, Row] = {}
    for row in rows:
        form = _form_of(row.value)
        if form is not None:
            first.setdefault(form, row)
    if not first:
        value = rows[0].value
        keys = ", ".join(value) if isinstance(value, dict) else "none"
        raise QaromaError(f"{rows[0].place}: the keys ({keys}) fit no known form; expected {_EXPECTED}.")
    if len(first) > 1:
        (a, row_a), (b, row_b) = list(first.items())[:2]
        raise QaromaError(
            f"{row_a.file} mixes two forms: {a} (line {row_a.line}) and {b} (line {row_b.line}); "
            "expected one form in a file. Split the file, or force a form with --data-format."
        )
    return next(iter(first))


def _form_of(value: dict[str, Any] | str) -> str | None:
    """The form whose keys a row has; the more structured first, since many rows also have ``text``."""
    if isinstance(value, str):
        return "text"
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if "prompt" in value and ("completion" in value or "response" in value):
        return "completion"
    return "text" if "text" in value else None


def parse_rows(rows: Sequence[Row], forced: str = "auto") -> Parsed:
    """Recognise the form of each file and turn its rows into conversations or documents.

    Args:
        rows: Rows of any number of files.
        forced: A form for all of them, or ``auto``.

    Returns:
        Conversations, documents, and the rows that are neither, each with its place.

    Raises:
        QaromaError: As :func:`recognise`.
    """
    parsed = Parsed()
    for file, group in groupby(rows, key=lambda row: row.file):
        members = list(group)
        form = recognise(members, forced)
        parsed.forms[file] = form
        for row in members:
            try:
                if form == "text":
                    parsed.documents.append((row, _document(row.value)))
                else:
                    parsed.conversations.append((row, to_conversation(row, form)))
            except BadRow as error:
                parsed.bad.append(f"{row.place}: {error}")
    return parsed


def to_conversation(row: Row, form: str) -> list[Message]:
    """The turns of one row.

    Args:
        row: The row.
        form: alpaca, completion, messages or sharegpt.

    Returns:
        An optional system turn, then turns of which the first is the user's and the last the assistant's.

    Raises:
        BadRow: A field is missing, blank or of the wrong type, a role is unknown, or the turns do
            not end with the assistant's.
    """
    readers: Mapping[str, Callable[[dict[str, Any]], list[Message]]] = {
        "alpaca": _alpaca,
        "completion": _completion,
        "messages": _messages,
        "sharegpt": _messages,
    }
    if not isinstance(row.value, dict):
        raise BadRow(f"got plain text; expected the fields of the form {form}")
    return _checked(readers[form](row.value))


def report_bad_rows(bad: Sequence[str], total: int) -> QaromaError:
    """One error for all bad rows: the first ten with their places, and how many more.

    Args:
        bad: ``file:line: what is wrong``.
        total: Rows in all, the bad ones included.

    Returns:
        The error, to be raised.
    """
    more = f"\n  and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
    listed = "".join(f"\n  {entry}" for entry in bad[:_SHOWN_BAD_ROWS])
    way_on = (
        "Mend them, or type --skip-bad-rows to go on without them." if len(bad) < total else "None is left: mend them."
    )
    return QaromaError(f"{len(bad)} of {total} rows cannot be used:{listed}{more}\n{way_on}")


def _alpaca(value: dict[str, Any]) -> list[Message]:
    instruction = _text(value, "instruction", optional=True)
    extra = _text(value, "input", optional=True)
    if not instruction and not extra:
        raise BadRow("the field 'instruction' is missing or blank")
    turns = [Message("system", _text(value, "system", optional=True))]
    history = _parsed_cell(value.get("history")) or []
    if not isinstance(history, list):
        raise BadRow(f"the field 'history' is {_kind(history)}; expected a list of [question, answer]")
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRow("an entry of 'history' is not a pair [question, answer] of texts")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = "\n\n".join(part for part in (instruction, extra) if part)
    return [*turns, Message("user", question), Message("assistant", _text(value, "output"))]


def _completion(value: dict[str, Any]) -> list[Message]:
    answer_key = "completion" if "completion" in value else "response"
    prompt, answer = _parsed_cell(value.get("prompt")), _parsed_cell(value.get(answer_key))
    if isinstance(prompt, list) and isinstance(answer, list):  # TRL's conversational variant
        return _turns([*prompt, *answer])
    return [Message("user", _text(value, "prompt")), Message("assistant", _text(value, answer_key))]


def _messages(value: dict[str, Any]) -> list[Message]:
    key = "messages" if "messages" in value else "conversations"
    turns = _parsed_cell(value.get(key))
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"the field '{key}' is {_kind(turns)}; expected a list of turns")
    system = _text(value, "system", optional=True)
    return [Message("system", system), *_turns(turns)] if system else _turns(turns)


def _turns(turns: Sequence[Any]) -> list[Message]:
    """Turns with role/content or from/value."""
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is {_kind(turn)}; expected an object")
        role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
        if role_key not in turn or content_key not in turn:
            raise BadRow(f"turn {number} has the keys {', '.join(turn)}; expected role and content, or from and value")
        role = turn[role_key]
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise BadRow(f"turn {number} has the role {role!r}; expected system, user (human) or assistant (gpt)")
        messages.append(Message(_ROLES[role.lower()], _content(turn[content_key], number)))
    return messages


def _content(content: Any, number: int) -> str:
    """Text of a turn, also where it is given as a list of text parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRow(f"turn {number} has a part that is not text; expected text alone")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"the content of turn {number} is {_kind(content)}; expected text")
    return content


def _checked(messages: list[Message]) -> list[Message]:
    """Leave out blank system turns; refuse blank turns and orders that cannot be trained on."""
    messages = [message for message in messages if message.role != "system" or message.content.strip()]
    for number, message in enumerate(messages, start=1):
        if not message.content.strip():
            raise BadRow(f"turn {number} ({message.role}) is blank")
    dialogue = [message.role for message in messages if message.role != "system"]
    if not dialogue or dialogue[-1] != "assistant" or messages[-1].role != "assistant":
        raise BadRow(f"the last turn is from {messages[-1].role if messages else 'nobody'}; expected the assistant's")
    if dialogue[0] != "user":
        raise BadRow("the first turn is from the assistant; expected the user's")
    return messages


def _document(value: dict[str, Any] | str) -> str:
    return value if isinstance(value, str) else _text(value, "text")


def _text(value: dict[str, Any], key: str, *, optional: bool = False) -> str:
    """A text field; an optional one may be missing, null or blank and is then the empty string."""
    content = value.get(key)
    if content is not None and not isinstance(content, str):
        raise BadRow(f"the field '{key}' is {_kind(content)}; expected text")
    if content is None or not content.strip():
        if optional:
            return ""
        raise BadRow(f"the field '{key}' is {'blank' if key in value and content is not None else 'missing'}")
    return content


def _parsed_cell(cell: Any) -> Any:
    """A list that was written into a CSV cell as JSON; anything else as it is."""
    if not (isinstance(cell, str) and cell.lstrip().startswith("[")):
        return cell
    try:
        return parse_json(cell)
    except ValueError:
        return cell


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing"
    names = {"str": "text", "int": "a number", "float": "a number", "bool": "true/false", "dict": "an object"}
    return "an empty list" if value == [] else names.get(type(value).__name__, f"a {type(value).__name__}")
