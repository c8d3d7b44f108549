"""The forms of training data, and how a row of each becomes a conversation.

=============  ==========================================================================
messages       ``messages`` (also ``conversation``, ``chat``, ``contents``): turns with ``role``, ``content``
sharegpt       ``conversations``: turns with ``from`` and ``value``
alpaca         ``instruction``, ``output`` (or ``response``); also ``input`` or ``context``
completion     ``prompt`` (``question``, ``query``, ``input``) and ``completion`` (``response``,
               ``answer``, ``output``); also ``context``
text           ``text``, or a .txt file: plain text, no question and answer
preference     ``chosen`` and ``rejected``: see :mod:`qaroma.data.feedback`
=============  ==========================================================================

``system``, ``history``, ``tools`` and ``weight`` are taken in every form but text. What has no
meaning here is named, so that nothing is left out without a word. Each file is recognised by
itself, so that sources of different forms mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from qaroma.data.calls import read_calls
from qaroma.data.feedback import LABELS, chosen_turns, is_preference, rejected_turns, verdict
from qaroma.data.fields import BadRow as BadRow
from qaroma.data.fields import Fields, parsed_cell, shared_length, text
from qaroma.data.files import data_suffix
from qaroma.data.rows import ANSWERS, QUESTIONS, TURNS, Ignored, alpaca, completion, history, messages, opening
from qaroma.data.sources import Row
from qaroma.data.turns import Message as Message
from qaroma.data.turns import checked, loss_weight, require_unicode
from qaroma.errors import QaromaError
from qaroma.runs.directory import quoted

FORMS = ("alpaca", "completion", "messages", "sharegpt", "text")
COLUMNS = ("prompt", "completion", "system", "context", "history", "tools", "weight", "messages", "text", "chosen",
           "rejected")  # fmt: skip

_EXPECTED = "messages; conversations; instruction and output; prompt and completion; or text"
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_SHOWN_BAD_ROWS = 10

Reader: TypeAlias = Callable[[Fields, Ignored], list[Message]]
_READERS: Mapping[str, Reader] = {
    "alpaca": alpaca,
    "completion": completion,
    "messages": messages,
    "sharegpt": messages,
    "preference": chosen_turns,
}


@dataclass
class Parsed:
    """Rows of any forms as conversations and documents.

    Attributes:
        conversations: pairs of a row and its turns; the last one is the assistant's. Of preferences each row has
            two, the chosen one first.
        documents: pairs of a row and its plain text.
        forms: the form of each file.
        bad: ``file:line: what is wrong``.
        ignored: names of keys that say something and have no meaning here; those of turns with ``turns:`` before.
        not_good: rows left out since they say that their answer is not good.
    """

    conversations: list[tuple[Row, list[Message]]] = field(default_factory=list)
    documents: list[tuple[Row, str]] = field(default_factory=list)
    forms: dict[str, str] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    not_good: int = 0

    @property
    def notes(self) -> list[str]:
        """Sentences about what was left out."""
        found = []
        if self.ignored:
            found.append(f"ignored keys: {', '.join(sorted(self.ignored))}")
        if self.not_good:
            found.append(f"{self.not_good} rows left out, whose answers are not good by their own label")
        return found


def recognise(rows: Sequence[Row], forced: str = "auto") -> str:
    """The form of the rows of one file, by their keys.

    Args:
        rows: rows of one file.
        forced: a form to use whatever the keys are, or ``auto``.

    Returns:
        One of ``FORMS``, or preference. Rows that fit no form do not count as long as others do.

    Raises:
        QaromaError: no row fits any form, or the rows are of two forms.
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
        raise QaromaError(f"{rows[0].place}: {_unknown(rows[0])}")
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
    fields = Fields(value)
    if is_preference(fields):
        return "preference"
    turns = next((key for key in TURNS if key in fields), None)
    if turns is not None:
        return "sharegpt" if turns == "conversations" else "messages"
    if "instruction" in fields and any(key in fields for key in ("output", "response")):
        return "alpaca"
    question = next((key for key in QUESTIONS if key in fields), None)
    answer = next((key for key in ANSWERS if key in fields and key != "answers"), None)
    if question and (answer or read_as_calls(fields.peek("answers"))):
        return "completion"
    return "text" if "text" in fields else None


def _unknown(row: Row) -> str:
    """Why the keys of a row fit no form, in words that help with the commonest cases."""
    if not isinstance(row.value, dict):
        return f"plain text; expected {_EXPECTED}."
    fields = Fields(row.value)
    keys = f"the keys ({', '.join(fields.names)})"
    way_on = f"expected {_EXPECTED}. Say which is which, as --columns {_columns_of(row.value)}."
    if "completions" in fields and "labels" in fields:
        return f"{keys} are steps with a label each (stepwise supervision); expected whole answers. {way_on}"
    if "segments" in fields:
        return f"{keys} are segments of rendered text (Axolotl's input_output); {way_on}"
    if any(key in fields for key in QUESTIONS):
        return f"{keys} hold a question without an answer that is text; {way_on}"
    in_table = " Is the line with the names there?" if data_suffix(Path(row.file)) in (".csv", ".tsv") else ""
    return f"{keys} fit no known form; {way_on}{in_table}"


def _columns_of(value: dict[str, Any]) -> str:
    """What ``--columns`` may be for a row: the first two of its keys that hold a text, where it has them."""
    asked, answered = [*(name for name, held in value.items() if isinstance(held, str)), "", ""][:2]
    return quoted(f"prompt={asked},completion={answered}") if answered else "prompt=ASKED,completion=ANSWERED"


def read_as_calls(value: Any) -> bool:
    """Whether a field is a list of calls (xLAM's ``answers``)."""
    try:
        return isinstance(parsed_cell(value), list) and bool(read_calls(value, "answers"))
    except BadRow:
        return False


def parse_rows(
    rows: Sequence[Row], forced: str = "auto", *, columns: Mapping[str, str] | None = None, feedback: str = "refuse"
) -> Parsed:
    """Recognise the form of each file and turn its rows into conversations or documents.

    Args:
        rows: rows of any number of files.
        forced: a form for all of them, or ``auto``.
        columns: which key stands for which of ``COLUMNS``; a file that has none of them is left as it is.
        feedback: ``refuse`` rows that say which answers are good, or train on the ``good`` ones alone.

    Returns:
        Conversations, documents, and the rows that are neither, each with its place.

    Raises:
        QaromaError: as :func:`recognise`; columns that are nowhere; feedback that is refused.
    """
    rows, named = _renamed(rows, columns or {})
    parsed = Parsed()
    for file, group in groupby(rows, key=lambda row: row.file):
        members = list(group)
        form = recognise(members, named if forced == "auto" else forced)
        parsed.forms[file] = form
        for row in members:
            try:
                if form == "text":
                    parsed.documents.append((row, _document(row.value, parsed.ignored)))
                elif verdict(row, form, feedback) is False:
                    parsed.not_good += 1
                else:
                    parsed.conversations.append((row, to_conversation(row, form, parsed.ignored)))
            except BadRow as error:
                parsed.bad.append(f"{row.place}: {error}")
    return parsed


def parse_pairs(rows: Sequence[Row], *, columns: Mapping[str, str] | None = None) -> Parsed:
    """As :func:`parse_rows` for rows with a better and a worse answer, of which both are wanted.

    Returns:
        Two conversations a row, the better answer's first, and the bad rows, each with its place.

    Raises:
        QaromaError: rows of another form; columns that are nowhere.
    """
    rows, _ = _renamed(rows, columns or {})
    parsed = Parsed()
    for file, group in groupby(rows, key=lambda row: row.file):
        members = list(group)
        if not holds_pairs(members):
            raise QaromaError(
                f"{members[0].place} is of the form {recognise(members)}, with one answer; expected a chosen and a "
                "rejected one for --task preference. Leave --task out to train on answers as they are"
            )
        parsed.forms[file] = "preference"
        for row in members:
            try:
                parsed.conversations += [(row, turns) for turns in to_pair(row, parsed.ignored)]
            except BadRow as error:
                parsed.bad.append(f"{row.place}: {error}")
    return parsed


def holds_pairs(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> bool:
    """Whether some rows have a better and a worse answer.

    Args:
        rows: of any files.
        columns: as :func:`parse_rows` takes them.
    """
    renamed, _ = _renamed(rows, columns or {})
    return any(isinstance(row.value, dict) and is_preference(Fields(row.value)) for row in renamed)


def _renamed(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[Sequence[Row], str]:
    """Rows under the keys of ``COLUMNS``, and the form that these keys say."""
    unknown = [key for key in columns if key not in COLUMNS]
    if unknown:
        raise QaromaError(f"got --columns {unknown[0]}=...; expected one of {', '.join(COLUMNS)} before each '='.")
    if not columns:
        return rows, "auto"
    seen = dict.fromkeys(name for row in rows if isinstance(row.value, dict) for name in row.value)
    for key, name in columns.items():
        if name not in seen:
            raise QaromaError(f"got --columns {key}={name}, but no row has {name}; there are {', '.join(seen)}.")
    renamed = []
    for row in rows:
        if isinstance(row.value, dict) and any(name in row.value for name in columns.values()):
            others = {name: value for name, value in row.value.items() if name not in columns.values()}
            row = replace(row, value=others | {key: row.value.get(name) for key, name in columns.items()})
        renamed.append(row)
    forms = {"chosen": "auto", "messages": "messages", "completion": "completion", "prompt": "completion",
             "text": "text"}  # fmt: skip
    return renamed, next((form for key, form in forms.items() if key in columns), "auto")


def to_conversation(row: Row, form: str, ignored: set[str] | None = None) -> list[Message]:
    """The turns of one row.

    Args:
        row: the row.
        form: alpaca, completion, messages, sharegpt or preference (its chosen answer).
        ignored: takes up the names of keys that have no meaning here.

    Returns:
        An optional system turn, then turns of which the last one is the assistant's.

    Raises:
        BadRow: a field is missing, blank or of the wrong type, a role is unknown, or the turns do
            not end with the assistant's.
    """
    return _conversations(row, form, (_READERS[form],), ignored)[0]


def to_pair(row: Row, ignored: set[str] | None = None) -> tuple[list[Message], list[Message]]:
    """The turns of a preference with the better answer, and with the worse one.

    Turns that both begin with are context: their weight is 0.

    Args:
        row: the row.
        ignored: as :func:`to_conversation` takes it.

    Raises:
        BadRow: as :func:`to_conversation`; answers that are the same, to different questions, or weighted.
    """
    chosen, rejected = _conversations(row, "preference", (chosen_turns, rejected_turns), ignored)
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same; expected two different answers")
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not chosen[shared].role == rejected[shared].role == "assistant":
        raise BadRow(f"chosen and rejected part at turn {shared + 1}, which is no answer; expected one question")
    if any(turn.weight != 1.0 for turn in (*chosen[shared:], *rejected[shared:])):
        raise BadRow("an answer has a weight other than 1; a pair is trained whole")
    context = [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in chosen[:shared]]
    return [*context, *chosen[shared:]], [*context, *rejected[shared:]]


def _conversations(row: Row, form: str, readers: Sequence[Reader], ignored: set[str] | None) -> list[list[Message]]:
    """The turns of one row, as each of some readers has them."""
    if not isinstance(row.value, dict):
        raise BadRow(f"got plain text; expected the fields of the form {form}")
    fields, ignored = Fields(row.value), set() if ignored is None else ignored
    media = next((key for key in _MEDIA if fields.peek(key) not in (None, "", [])), None)
    if media:
        raise BadRow(f"the row has {media}, which a text run does not see; leave such rows out with --skip-bad-rows")

    def of_turns(names: Iterable[str]) -> None:
        ignored.update(f"turns: {name}" for name in names)

    before = [*opening(fields, of_turns), *history(fields, of_turns)]
    talks = [[*before, *read(fields, of_turns)] for read in readers]
    weight = loss_weight(fields, "the row")
    if weight != 1.0:
        talks = [[replace(turn, weight=turn.weight * weight) for turn in turns] for turns in talks]
    if verdict(row, form, "good") is not None:
        fields.get(*LABELS)
    ignored.update(fields.ignored())
    return [checked(turns) for turns in talks]


def report_bad_rows(bad: Sequence[str], total: int) -> QaromaError:
    """One error for all bad rows: the first ten with their places, and how many more.

    Args:
        bad: ``file:line: what is wrong``.
        total: rows in all, the bad ones included.

    Returns:
        The error, to be raised.
    """
    more = f"\n  and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
    listed = "".join(f"\n  {entry}" for entry in bad[:_SHOWN_BAD_ROWS])
    way_on = (
        "Mend them, or type --skip-bad-rows to go on without them." if len(bad) < total else "None is left: mend them."
    )
    return QaromaError(f"{len(bad)} of {total} rows cannot be used:{listed}{more}\n{way_on}")


def _document(value: dict[str, Any] | str, ignored: set[str]) -> str:
    if isinstance(value, str):
        content = value
    else:
        fields = Fields(value)
        content = text(fields, "text")
        ignored.update(fields.ignored())
    require_unicode(content, "the text")
    return content
