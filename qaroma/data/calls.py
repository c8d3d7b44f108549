"""Functions that an assistant may call, its calls, and what they gave: read, and written as JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from qaroma.data.fields import BadRow, kind_of
from qaroma.text.json_text import parse_json

Tool: TypeAlias = dict[str, Any]  # {"type": "function", "function": {"name": ..., "parameters": {...}}}
Call: TypeAlias = dict[str, Any]  # {"type": "function", "function": {"name": ..., "arguments": {...}}}


def read_tools(value: Any) -> tuple[Tool, ...]:
    """The functions of a row, as OpenAI, Anthropic or a JSON text of theirs describe them.

    Raises:
        BadRow: no list of functions with names.
    """
    listed = _parsed(value)
    if listed is None or listed == "":
        return ()
    if isinstance(listed, Mapping):
        listed = [listed]
    if not isinstance(listed, list):
        raise BadRow(f"the field 'tools' is {kind_of(listed)}; expected a list of functions")
    tools = []
    for number, entry in enumerate(map(_parsed, listed), start=1):
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"entry {number} of 'tools' is no function with a name")
        function = dict(function)
        if "input_schema" in function:
            function["parameters"] = function.pop("input_schema")
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def read_calls(value: Any, where: str) -> tuple[Call, ...]:
    """Calls with names and arguments, one or a list of them, as objects or as JSON text.

    Args:
        value: None is no call.
        where: the turn or field, for messages.

    Raises:
        BadRow: no call, or arguments that are no JSON object.
    """
    listed = _parsed(value)
    if listed is None or listed == "":
        return ()
    calls = []
    for entry in map(_parsed, listed if isinstance(listed, list) else [listed]):
        function = _parsed(entry.get("function", entry)) if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"{where} has a call that is {kind_of(entry)} without a name; expected name and arguments")
        keys = ("arguments", "parameters", "input", "args")
        arguments = _parsed(next((function[key] for key in keys if function.get(key) is not None), {}))
        if arguments == "":
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise BadRow(f"{where} calls {function['name']} with arguments that are no JSON object")
        call = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        given = entry.get("id")
        calls.append({"id": given, **call} if isinstance(given, str) and given else call)
    return tuple(calls)


def tools_text(tools: tuple[Tool, ...]) -> str:
    """What the assistant may call, as one JSON list."""
    return "Tools: " + json.dumps([tool["function"] for tool in tools], ensure_ascii=False)


def calls_text(calls: tuple[Call, ...]) -> str:
    """Calls as JSON objects, one a line."""
    return "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in calls)


def _parsed(value: Any) -> Any:
    """The JSON that a text holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value
