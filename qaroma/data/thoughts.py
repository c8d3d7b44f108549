"""Thoughts as reasoning models write them, between ``<think>`` and ``</think>`` before the answer."""

from __future__ import annotations

import re

from qaroma.data.turns import Message

THOUGHT, THOUGHT_END = "<think>", "</think>"
CLOSED_THOUGHT = "\n</think>\n\n"
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_AT_THE_END = re.compile(r"<think>\s*</think>\s*$")
_REST_OF_EMPTY_THOUGHT = re.compile(r"\s*</think>\s*")


def has_thought(content: str) -> bool:
    """Whether an answer holds a thought that is not empty."""
    before, end, _ = content.partition(THOUGHT_END)
    return bool(end and before.replace(THOUGHT, "").strip())


def with_thought(message: Message) -> str:
    """The words of a turn with its thought before them, as reasoning models write it."""
    if not message.thought:
        return message.content
    return f"{THOUGHT}\n{message.thought}{CLOSED_THOUGHT}{message.content}"


def without_empty_thought(prompt: str, answer: str) -> tuple[str, str]:
    """Move an empty thought from the answer to the prompt: nobody is to learn to think nothing."""
    pattern = _REST_OF_EMPTY_THOUGHT if prompt.rstrip().endswith(THOUGHT) else _EMPTY_THOUGHT
    empty = pattern.match(answer)
    return (prompt + empty[0], answer[empty.end() :]) if empty else (prompt, answer)


def after_open_thought(prompt: str, content: str) -> str:
    """An answer as it continues a prompt that ends inside an opened thought."""
    if not prompt.rstrip().endswith(THOUGHT):
        return content
    opened = content.lstrip()
    if opened.startswith(THOUGHT):
        return opened[len(THOUGHT) :].lstrip("\n")
    return content if THOUGHT_END in content else CLOSED_THOUGHT + content


def after_empty_thought(whole: str, before: str) -> str:
    """What a rendered turn says after an empty thought that its prompt spells otherwise; empty where it has none."""
    turn = whole.removeprefix(before)
    thought, end, said = turn.partition(THOUGHT_END)
    return said.lstrip("\n") if end and not thought.rpartition(THOUGHT)[2].strip() else ""


def ends_with_empty_thought(prompt: str) -> bool:
    """Whether a prompt tells the model not to think."""
    return _AT_THE_END.search(prompt) is not None
