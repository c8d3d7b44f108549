"""How the fields of one row become turns, form by form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from qaroma.data.calls import read_calls, read_tools
from qaroma.data.fields import BadRow, Fields, kind_of, optional_text, parsed_cell, text, turns_cell
from qaroma.data.glaive import glaive_system, glaive_turns
from qaroma.data.turns import Message, read_turns

TURNS = ("messages", "conversations", "conversation", "chat", "contents", "dialog", "dialogue")
QUESTIONS = ("prompt", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output", "answers")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "systeminstruction", "system_instruction")
TOOLS = ("tools", "functions")

Ignored: TypeAlias = Callable[[Iterable[str]], None]  # told of the keys of turns that have no meaning here


def opening(fields: Fields, of_turns: Ignored) -> list[Message]:
    """The system turn and the tools that stand beside the conversation; blank where there are none."""
    tools, system = read_tools(fields.get(*TOOLS)), fields.get(*SYSTEMS)
    if isinstance(system, str) and isinstance(fields.peek("chat"), str):
        return [glaive_system(system)]
    if isinstance(system, Mapping):  # Gemini's systemInstruction is a turn without a role
        return [Message("system", "", tools=tools), *read_turns([{"role": "system", **system}], "system", of_turns)]
    content = optional_text(fields, *SYSTEMS)
    return [Message("system", content, tools=tools)] if content or tools else []


def history(fields: Fields, of_turns: Ignored) -> list[Message]:
    """Earlier turns, as pairs of a question and an answer or as turns."""
    history = parsed_cell(fields.get("history")) or []
    if not isinstance(history, list):
        raise BadRow(f"the field 'history' is {kind_of(history)}; expected a list of [question, answer]")
    if history and isinstance(history[0], Mapping):
        return read_turns(history, "history", of_turns)
    turns = []
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRow("an entry of 'history' is not a pair [question, answer] of texts")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def alpaca(fields: Fields, of_turns: Ignored) -> list[Message]:
    return [instruction_turn(fields), Message("assistant", text(fields, "output", "response"))]


def instruction_turn(fields: Fields) -> Message:
    """The user's turn of an instruction and what it is about.

    Raises:
        BadRow: both are missing or blank.
    """
    parts = [optional_text(fields, "instruction"), *(optional_text(fields, key) for key in CONTEXTS)]
    if not any(parts):
        raise BadRow("the field 'instruction' is missing or blank")
    return Message("user", "\n\n".join(part for part in parts if part))


def question_turns(fields: Fields, of_turns: Ignored) -> list[Message]:
    """The turns of a question: a list of turns, or a text and what it is about.

    Raises:
        BadRow: it is missing, blank or no text.
    """
    asked = turns_cell(fields.get(*QUESTIONS))
    if isinstance(asked, list) and asked and isinstance(asked[0], Mapping):
        return read_turns(asked, fields.name(*QUESTIONS), of_turns)
    parts = [text(fields, *QUESTIONS), optional_text(fields, "context")]
    return [Message("user", "\n\n".join(part for part in parts if part))]


def completion(fields: Fields, of_turns: Ignored) -> list[Message]:
    asked = question_turns(fields, of_turns)
    answer = turns_cell(fields.get(*ANSWERS))
    name = fields.name(*ANSWERS)
    calls = parsed_cell(answer) if name == "answers" else None
    if isinstance(calls, list):
        return [*asked, Message("assistant", "", calls=read_calls(calls, "the field 'answers'"))]
    if isinstance(answer, list) and answer and isinstance(answer[0], Mapping):  # TRL's conversational variant
        return [*asked, *read_turns(answer, name, of_turns)]
    return [*asked, Message("assistant", text(fields, *ANSWERS))]


def messages(fields: Fields, of_turns: Ignored) -> list[Message]:
    turns = parsed_cell(fields.get(*TURNS))
    name = fields.name(*TURNS)
    if isinstance(turns, str) and name == "chat":
        return glaive_turns(turns)
    return read_turns(turns, name, of_turns)
