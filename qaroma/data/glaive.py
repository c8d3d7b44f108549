"""Glaive's function calls: a conversation in one text, with the functions in the system's."""

from __future__ import annotations

import json
import re

from qaroma.data.calls import read_calls, read_tools
from qaroma.data.fields import BadRow
from qaroma.data.turns import Message

_SPEAKER = re.compile(r"\s*\b(USER|ASSISTANT|FUNCTION RESPONSE):\s*")
_END = "<|endoftext|>"
_CALL = "<functioncall>"
_QUOTED = re.compile(r"""("arguments":\s*)'(.*)'(\s*})""", re.DOTALL)


def glaive_system(text: str) -> Message:
    """The system turn of a text ``SYSTEM: ...``, and the functions that it lists as JSON at its end."""
    words = text.strip().removeprefix("SYSTEM:").strip()
    start = words.find("{")
    decoder, tools, position = json.JSONDecoder(), [], start
    while 0 <= position < len(words):
        try:
            tool, position = decoder.raw_decode(words, position)
        except json.JSONDecodeError as error:
            raise BadRow(f"the functions in 'system' are no JSON ({error.msg})") from None
        tools.append(tool)
        position = words.find("{", position)
    return Message("system", words if start < 0 else words[:start].rstrip(" -\n"), tools=read_tools(tools))


def glaive_turns(text: str) -> list[Message]:
    """The turns of a text with ``USER:``, ``ASSISTANT:`` and ``FUNCTION RESPONSE:``.

    Raises:
        BadRow: it begins with none of them, or a call is no JSON.
    """
    pieces = _SPEAKER.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise BadRow("the field 'chat' is one text without 'USER:' at its beginning; expected a list of turns")
    turns = []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        words, _, call = said.replace(_END, "").partition(_CALL)
        if speaker == "ASSISTANT":
            # The arguments are JSON in single quotes.
            called = _QUOTED.sub(lambda found: f"{found[1]}{found[2]}{found[3]}", call.strip())
            turns.append(Message("assistant", words.strip(), calls=read_calls(called, "the field 'chat'")))
        else:
            turns.append(Message("user" if speaker == "USER" else "tool", words.strip()))
    return turns
