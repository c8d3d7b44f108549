"""Rows that say which answers are good: preferences (chosen and rejected), and answers with a label (KTO).

Trained on plainly they would teach the bad answers too, so they are refused unless the good ones alone
are asked for; task ``preference`` trains on both answers of a preference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qaroma.data.calls import read_tools
from qaroma.data.fields import BadRow, Fields, parsed_cell, shared_length, turns_cell
from qaroma.data.rows import QUESTIONS, TURNS, Ignored, instruction_turn, question_turns
from qaroma.data.sources import Row
from qaroma.data.turns import Message, read_turns
from qaroma.errors import QaromaError

FEEDBACK = ("refuse", "good")
LABELS = ("label", "kto_tag")

_PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"),
          ("preferred_output", "non_preferred_output"))  # fmt: skip
_SIDES = tuple(tuple(names) for names in zip(*_PAIRS, strict=True))  # the better answer's names, the worse one's
_BESIDE = ("rejected_response", "rejected_messages")  # beside turns that end with the better answer (ms-swift)
_TURN = re.compile(r"\n*\s*(Human|Assistant): ?")
_TRUTHS: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def is_preference(fields: Fields) -> bool:
    """Whether a row holds a better and a worse answer."""
    return any(chosen in fields and rejected in fields for chosen, rejected in _PAIRS) or _stands_beside(fields)


def _stands_beside(fields: Fields) -> bool:
    """Whether the worse answer stands beside turns that end with the better one."""
    chosen = any(name in fields for name in _SIDES[0])
    return not chosen and any(name in fields for name in _BESIDE) and any(name in fields for name in TURNS)


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
        what, way = (
            "two answers, chosen and rejected (preferences)",
            "train plainly on the chosen ones, or --task preference to train on both",
        )
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
    return _answered(fields, of_turns, 0)


def rejected_turns(fields: Fields, of_turns: Ignored) -> list[Message]:
    """As :func:`chosen_turns`, with the answer that was rejected."""
    return _answered(fields, of_turns, 1)


def _answered(fields: Fields, of_turns: Ignored, side: int) -> list[Message]:
    """The turns of a preference with one of its answers: 0 is the chosen one, 1 the rejected one."""
    if _stands_beside(fields):
        return _answered_beside(fields, of_turns, side)
    both = [turns_cell(fields.get(*names)) for names in _SIDES]
    answer = both[side]
    if answer is None:
        raise BadRow(f"the field '{_SIDES[side][0]}' is missing")
    if isinstance(answer, Mapping) and "messages" in answer:
        answer = answer["messages"]
    asked = _asked(fields, of_turns)
    if isinstance(answer, str) and not asked:
        return _marked(answer) or _continued(both, side)
    if isinstance(answer, str):
        return [*asked, Message("assistant", answer)]
    turns = read_turns([answer] if isinstance(answer, Mapping) else answer, fields.name(*_SIDES[side]), of_turns)
    whole = len(turns) > 1 and any(turn.role == "user" for turn in turns)
    return turns if whole else [*asked, *turns]


def _answered_beside(fields: Fields, of_turns: Ignored, side: int) -> list[Message]:
    """As :func:`_answered`, where turns end with the better answer and the worse one stands beside them."""
    name, rejected = fields.name(*TURNS), turns_cell(fields.get(*_BESIDE))
    turns = read_turns(parsed_cell(fields.get(*TURNS)), name, of_turns)
    if side == 0:
        return turns
    if isinstance(rejected, str):
        return [*turns[:-1], Message("assistant", rejected)]
    return read_turns(rejected, fields.name(*_BESIDE), of_turns)


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
    """The turns of a text that names its speakers (``Human:`` and ``Assistant:``); empty where it does not."""
    pieces = _TURN.split(dialogue)
    if len(pieces) < 4 or pieces[0].strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def _continued(both: Sequence[Any], side: int) -> list[Message]:
    """The turns of two texts that begin alike: the words that they share are the question (TRL's implicit prompt)."""
    texts = [text if isinstance(text, str) else "" for text in both]
    shared = texts[0][: shared_length(*texts)]
    question = shared[: max(shared.rfind(" "), shared.rfind("\n"), 0)]
    if not question.strip():
        raise BadRow(
            "chosen and rejected are texts without a question; expected a prompt, turns of 'Human:' and "
            "'Assistant:', or texts that begin alike"
        )
    return [Message("user", question), Message("assistant", texts[side][len(question) :])]
