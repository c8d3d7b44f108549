"""What a chat template does with functions, calls and their results, found out by trying; and the way without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qaroma.data.calls import Call, Tool, calls_text, tools_text
from qaroma.data.fields import BadRow
from qaroma.data.turns import Message

Render: TypeAlias = Callable[[list[dict[str, Any]], list[Tool] | None], str]

_NAME, _PLACE, _RESULT = "qaromafunction", "qaromaplace", "qaromaresult"
_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "p"}}},
    },
}
_ASKED = {"role": "user", "content": "q"}
_ID = "call00000"
_ANSWER = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": _ID}


@dataclass(frozen=True)
class ToolSupport:
    """What a chat template renders.

    Attributes:
        tools: the functions that may be called.
        calls: the assistant's calls.
        results: what they gave, as something other than the assistant's or the system's words.
        text_arguments: it wants a call's arguments as JSON text, not as an object.
        call: a conversation that ends with a call; empty where it renders none.
    """

    tools: bool = False
    calls: bool = False
    results: bool = False
    text_arguments: bool = False
    call: str = ""

    def require(self, messages: Sequence[Message]) -> None:
        """Refuse a conversation that the template would not render whole.

        Raises:
            BadRow: it has something that the template leaves out.
        """
        missing = [
            what
            for what, there, rendered in (
                ("functions (tools)", any(m.tools for m in messages), self.tools),
                ("calls", any(m.calls for m in messages), self.calls),
                ("results of calls", any(m.role == "tool" for m in messages), self.results),
            )
            if there and not rendered
        ]
        if missing:
            what = " and ".join(missing)
            raise BadRow(f"the chat template does not render {what}; type --tools text to write them as JSON text")


def find_tool_support(render: Render) -> ToolSupport:
    """Try a template with one function, one call and one result.

    Args:
        render: renders turns and functions with the template; raises :class:`BadRow` where it refuses.
    """
    called = {True: _called(json.dumps({"place": _PLACE})), False: _called({"place": _PLACE})}
    written = {text: _tried(render, [_ASKED, turn]) for text, turn in called.items()}
    renders = {text: _renders_call(shown) for text, shown in written.items()}
    text_arguments = renders[True] and not renders[False]
    before = [_ASKED, called[text_arguments]]
    shown = {role: _tried(render, [*before, {**_ANSWER, "role": role}]) for role in ("tool", "assistant", "system")}
    own = _RESULT in shown["tool"] and shown["tool"] not in (shown["assistant"], shown["system"])
    declared = _NAME in _tried(render, [_ASKED], [_TOOL])
    call = written[text_arguments] if any(renders.values()) else ""
    return ToolSupport(declared, bool(call), own, text_arguments, call)


def as_text(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with functions, calls and results as JSON text in turns that every template knows."""
    written: list[Message] = []
    after_result = False
    for message in messages:
        parts = [message.content]
        if message.tools:
            parts.append(tools_text(message.tools))
        if message.calls:
            parts.append(calls_text(message.calls))
        content = ("\n" if message.calls else "\n\n").join(part for part in parts if part)
        result = message.role == "tool"
        plain = replace(message, role="user" if result else message.role, content=content, calls=(), tools=(),
                        name="", call_id="")  # fmt: skip
        if result and after_result:
            plain = replace(plain, content=f"{written.pop().content}\n{plain.content}")
        after_result = result
        written.append(plain)
    return written


def call_fields(calls: Sequence[Call], text_arguments: bool) -> list[Call]:
    """Calls as a template wants them."""
    if not text_arguments:
        return list(calls)
    return [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in calls
    ]


def _called(arguments: Any) -> dict[str, Any]:
    function = {"name": _NAME, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": _ID, "type": "function", "function": function}]}


def _renders_call(text: str) -> bool:
    """Whether name and argument are there, and no JSON was made of what is JSON already."""
    return _NAME in text and _PLACE in text and '\\"' not in text


def _tried(render: Render, turns: list[dict[str, Any]], tools: list[Tool] | None = None) -> str:
    try:
        return render(turns, tools)
    except BadRow:
        return ""
