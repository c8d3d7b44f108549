"""Rows that say which answers are good: preferences (chosen and rejected), and answers with a label (KTO).

Trained on plainly they would teach the bad answers too, so they are refused unless the good ones alone
are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qaroma.data.calls import read_tools
from qaroma.data.fields import BadRow, Fields, parsed_cell
from qaroma.data.rows import QUESTIONS, Ignored, instruction_turn, question_turns
from qaroma.data.sources import Row
from qaroma.data.turns import Message, read_turns
from qaroma.errors import QaromaError

FEEDBACK = ("refuse", "good")
LABELS = ("label", "kto_tag")

_PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"),
          ("preferred_output", "non_preferred_output"))  # fmt: skip
_CHOSEN = tuple(chosen for chosen, _ in _PAIRS)
_REJECTED = tuple(rejected for _, rejected in _PAIRS)
_TURN = re.compile(r"\n*\s*(Human|Assistant): ?")
_TRUTHS: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def is_preference(fields: Fields) -> bool:
    """Whether a row holds a better and a worse answer."""
    return any(chosen in fields and rejected in fields for chosen, rejected in _PAIRS)


def verdict(row: Row, form: str, feedback: str) -> bool | None:
    """Whether a row says that its answer is good; None where it says nothing of it.

    Args:
        row: the row.
        form: its form.
        feedback: ``refuse`` such rows, or train on the ``good`` ones alone.

    Raises:
        QaromaError: it says so and that is refused.
    """
    if feedback not in FEEDBACK:
        raise QaromaError(f"got feedback '{feedback}'; expected {' or '.join(FEEDBACK)}.")
    if form == "preference":
        good: bool | None = True
        what, way = "two answers, chosen and rejected (preferences)", "train plainly on the chosen ones"
    else:
        fields = Fields(row.value) if isinstance(row.value, dict) else Fields({})
        label = next((fields.peek(key) for key in LABELS if key in fields), None)
        label = label.strip().lower() if isinstance(label, str) else label
        good = _TRUTHS.get(label) if isinstance(label, str | bool | int) else None
        what, way = "a label that says whether the answer is good (KTO)", "train on the good ones alone"
    if good is not None and feedback == "refuse":
        raise QaromaError(f"{row.place} has {what}, which plain training does not heed; type --feedback good to {way}.")
    return good


def chosen_turns(fields: Fields, of_turns: Ignored) -> list[Message]:
    """The turns of a preference, with the answer that was chosen.

    Raises:
        BadRow: no question, or no chosen answer.
    """
    chosen = parsed_cell(fields.get(*_CHOSEN))
    fields.get(*_REJECTED)
    if isinstance(chosen, Mapping) and "messages" in chosen:
        chosen = chosen["messages"]
    asked = _asked(fields, of_turns)
    if isinstance(chosen, str) and not asked:
        return _marked(chosen)
    if isinstance(chosen, str):
        return [*asked, Message("assistant", chosen)]
    answer = read_turns([chosen] if isinstance(chosen, Mapping) else chosen, fields.name(*_CHOSEN), of_turns)
    whole = len(answer) > 1 and any(turn.role == "user" for turn in answer)
    return answer if whole else [*asked, *answer]


def _asked(fields: Fields, of_turns: Ignored) -> list[Message]:
    """What was answered; empty where it stands in the answers themselves."""
    turns = next((key for key in ("conversations", "messages", "conversation") if key in fields), None)
    if turns is not None:
        return read_turns(parsed_cell(fields.get(turns)), turns, of_turns)
    if "instruction" in fields:
        return [instruction_turn(fields)]
    given = fields.peek("input")
    if isinstance(given, Mapping) and "messages" in given:  # OpenAI's
        fields.get("input")
        offered = Message("system", "", tools=read_tools(given.get("tools")))
        return [offered, *read_turns(given["messages"], "input", of_turns)]
    if any(key in fields for key in QUESTIONS):
        return question_turns(fields, of_turns)
    return []


def _marked(dialogue: str) -> list[Message]:
    """The turns of a text that names its speakers (``Human:`` and ``Assistant:``)."""
    pieces = _TURN.split(dialogue)
    if len(pieces) < 4 or pieces[0].strip():
        raise BadRow("the chosen answer has no question; expected a prompt, or turns of 'Human:' and 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]
