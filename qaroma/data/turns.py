"""Turns of a conversation: what one is, and how it is read under the keys that public data gives it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qaroma.data.calls import Call, Tool, read_calls
from qaroma.data.fields import BadRow, Fields, kind_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_CONTENTS = ("content", "value", "parts")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight")
_SWITCHES = ("train", "training", "loss")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("reasoning", "thinking")
_CALL_PARTS = ("tool_call", "tool_use", "function_call")
_EMPTY_THOUGHT = re.compile(r"^\s*<think>\s*</think>\s*")  # written by models that were told not to think
_ID = "call{:05d}"  # nine letters and figures: Mistral's templates refuse any other


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant, or tool (the result of a call).
        content: what is said.
        thought: what the assistant thinks before it says it; empty where nothing is known of that.
        calls: what the assistant calls, as OpenAI writes it, with the arguments as an object.
        tools: of a system turn, what the assistant may call, as JSON schemas.
        name: of a tool's result, the function's.
        call_id: of a tool's result, the call's.
        weight: factor of the turn's loss; 0 is context alone.
    """

    role: str
    content: str
    thought: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[Tool, ...] = ()
    name: str = ""
    call_id: str = ""
    weight: float = 1.0


def read_turns(turns: Any, where: str, ignored: Callable[[Iterable[str]], None]) -> list[Message]:
    """The turns of a list under one of the usual pairs of keys.

    Args:
        turns: objects with role and content, from and value, or input and output.
        where: the field they stand in, for messages.
        ignored: told of the keys that have no meaning here.

    Raises:
        BadRow: something is missing, of the wrong type or no text.
    """
    if isinstance(turns, Mapping):
        turns = _by_turn(turns)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        raise BadRow(f"the field '{where}' is a printed list that is not JSON; save the table as .jsonl or .parquet")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"the field '{where}' is {kind_of(turns)}; expected a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"turn {number} is {kind_of(turn)}; expected an object")
        fields = Fields(turn)
        for message in _pair(fields, number) or _turn(fields, number):
            last = messages[-1] if messages else None
            if last and last.calls and message.calls and not (last.content or message.content or message.thought):
                messages[-1] = replace(last, calls=(*last.calls, *message.calls))  # calls made at once
            else:
                messages.append(message)
        ignored(fields.ignored())
    return messages


def checked(messages: Sequence[Message]) -> list[Message]:
    """Bring turns into the order that can be trained on, or refuse them.

    System turns at the beginning become one, blank ones and empty thoughts are left out, and calls and
    results are tied to each other.

    Raises:
        BadRow: a blank turn, text that is no Unicode, no user's turn, or a last turn that is not the assistant's.
    """
    messages = [replace(m, content=_EMPTY_THOUGHT.sub("", m.content)) for m in messages]
    for number, message in enumerate(messages, start=1):
        if not (message.content.strip() or message.calls or message.role in ("system", "tool")):
            raise BadRow(f"turn {number} ({message.role}) is blank")
        require_unicode(message.content + message.thought, f"turn {number}")
        if message.calls or message.tools:
            require_unicode(json.dumps([message.calls, message.tools], ensure_ascii=False), f"turn {number}")
    first = next((index for index, m in enumerate(messages) if m.role != "system"), len(messages))
    contents = dict.fromkeys(m.content for m in messages[:first] if m.content.strip())
    opening = Message("system", "\n\n".join(contents), tools=tuple(tool for m in messages for tool in m.tools))
    rest = [m for m in messages[first:] if m.role != "system" or m.content.strip()]
    if not rest or rest[-1].role != "assistant":
        last = rest[-1].role if rest else "system" if contents else "nobody"
        raise BadRow(f"the last turn is from {last}; expected the assistant's")
    if not any(m.role == "user" for m in rest):
        raise BadRow("no turn is the user's; expected at least one")
    return _tied([opening, *rest] if opening.content or opening.tools else rest)


def folded(messages: Sequence[Message]) -> list[Message]:
    """Move system turns into the user turn they follow, or else the next one."""
    moved: list[Message] = []
    waiting = ""
    for message in messages:
        if message.role == "system" and moved and moved[-1].role == "user":
            moved[-1] = Message("user", f"{moved[-1].content}\n\n{message.content}")
        elif message.role == "system":
            waiting += message.content + "\n\n" if message.content else ""
        elif message.role == "user":
            moved.append(Message("user", waiting + message.content))
            waiting = ""
        else:
            moved.append(message)
    return moved


def require_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer can read.

    Raises:
        BadRow: it has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"{where} holds {half}, half of a surrogate pair, which is no character") from None


def loss_weight(fields: Fields, where: str) -> float:
    """The factor of a turn's or a row's loss, from every key that says something of it.

    Raises:
        BadRow: it is no number of at least 0.
    """
    values = {key: fields.get(key) for key in _WEIGHTS}
    return math.prod(_number(v, f"'{key}' of {where}") for key, v in values.items() if v is not None and v != "")


def _turn(fields: Fields, number: int) -> list[Message]:
    role = fields.get("role", "from")
    if role is None or not any(map(fields.stands, (*_CONTENTS, "tool_calls", "function_call"))):
        raise BadRow(
            f"turn {number} has the keys {', '.join(fields.names)}; expected role and content, or from and value"
        )
    kind = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if kind is None:
        raise BadRow(f"turn {number} has the role {role!r}; expected system, user (human), assistant (gpt) or tool")
    content = fields.get(*_CONTENTS)
    if kind == "call":
        return [Message("assistant", "", calls=read_calls(content, f"turn {number}"), weight=_weight(fields, number))]
    if kind == "tool" and isinstance(content, Mapping) and "type" not in content:
        content = json.dumps(content, ensure_ascii=False)
    text, thought, calls, results = _content(content, number)
    if kind == "tool":
        return [Message("tool", text, name=_word(fields, "name"), call_id=_word(fields, "tool_call_id"))]
    if kind != "assistant":
        if any(fields.peek(key) is True for key in _SWITCHES):
            raise BadRow(f"turn {number} ({kind}) is to be trained; expected that of the assistant's turns alone")
        for key in (*_WEIGHTS, *_SWITCHES):
            fields.get(key)
        return [*results, Message(kind, text)] if text or not results else results
    called = read_calls(fields.get("tool_calls"), f"turn {number}")
    called += read_calls(fields.get("function_call"), f"turn {number}")
    if content is None and not (called or calls):
        raise BadRow(f"the content of turn {number} is missing; expected text")
    thought = (thought or _word(fields, *_THOUGHTS)).strip("\n")
    return [Message("assistant", text, thought, (*calls, *called), weight=_weight(fields, number))]


def _pair(fields: Fields, number: int) -> list[Message]:
    """A turn that holds a question and its answer (XTuner); empty where it is not one."""
    if "role" in fields or "from" in fields or not ("input" in fields and "output" in fields):
        return []
    texts = [_content(fields.get(key), number)[0] if key in fields else "" for key in ("system", "input", "output")]
    return [
        Message(role, text)
        for role, text in zip(("system", "user", "assistant"), texts, strict=True)
        if text or role == "assistant"
    ]


def _content(content: Any, number: int) -> tuple[str, str, tuple[Call, ...], list[Message]]:
    """Text, thought, calls and results of a turn, also where it is given in parts."""
    if content is None or isinstance(content, str):
        return content or "", "", (), []
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise BadRow(f"the content of turn {number} is {kind_of(content)}; expected text")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: tuple[Call, ...] = ()
    results: list[Message] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") or ("text" if "text" in part else None) if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS:
            texts.append(_part_text(part, ("text", "value"), number))
        elif kind in _THOUGHT_PARTS:
            thoughts.append(_part_text(part, ("text", "value", str(kind)), number))
        elif kind in _CALL_PARTS:
            calls += read_calls(part.get("value") or part.get("tool_call") or part, f"turn {number}")
        elif kind == "tool_result":
            inner = _content(part.get("content"), number)[0]
            results.append(Message("tool", inner, call_id=str(part.get("tool_use_id") or "")))
        else:
            shown = f"of type {kind}" if kind else "without a type"
            raise BadRow(f"turn {number} has a part that is not text ({shown}); a text run trains on text alone")
    return "".join(texts), "\n".join(thoughts), calls, results


def _part_text(part: Mapping[str, Any], keys: Sequence[str], number: int) -> str:
    text = next((part[key] for key in keys if part.get(key) is not None), None)
    if not isinstance(text, str):
        raise BadRow(f"turn {number} has a part of type {part.get('type')} without text; expected it under {keys[0]}")
    return text


def _weight(fields: Fields, number: int) -> float:
    factor = loss_weight(fields, f"turn {number}")
    for key in _SWITCHES:
        value = fields.get(key)
        if value is not None:
            factor *= float(value) if isinstance(value, bool) else _number(value, f"'{key}' of turn {number}")
    return factor


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise BadRow(f"{what} is {value!r}; expected a factor of the loss, a number of at least 0")
    return number


def _word(fields: Fields, *names: str) -> str:
    value = fields.get(*names)
    return value if isinstance(value, str) else ""


def _by_turn(columns: Mapping[str, Any]) -> list[Any] | Mapping[str, Any]:
    """A list of turns from one list for each key, as tables hold them; anything else as it is."""
    lists = list(columns.values())
    if not lists or not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        return columns
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*lists, strict=True)]


def _tied(messages: Sequence[Message]) -> list[Message]:
    """Give calls their ids and results those of their calls, in order, where the data has none."""
    waiting: list[Call] = []
    tied = []
    count = 0
    for message in messages:
        if message.calls:
            calls = []
            for call in message.calls:
                calls.append({"id": _ID.format(count), **call})
                count += 1
            message = replace(message, calls=tuple(calls))
            waiting = list(message.calls)
        elif message.role == "tool" and waiting:
            call = next((call for call in waiting if call["id"] == message.call_id), waiting[0])
            waiting.remove(call)
            call_id, name = message.call_id or call["id"], message.name or call["function"]["name"]
            message = replace(message, call_id=call_id, name=name)
        tied.append(message)
    return tied
