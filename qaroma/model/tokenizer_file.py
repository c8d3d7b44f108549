"""What a ``tokenizer.json`` may ask of the Rust library while it loads and decodes, where nothing can interrupt it.

Loading normalises the added tokens, and decoding replaces text, both with the interpreter's lock held: their regular
expressions and what they make of a text are looked at before. Splitting text is bounded where it happens
(:mod:`qaroma.data.tokens`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qaroma.errors import QaromaError
from qaroma.text.paths import inside

T = TypeVar("T", bound=BaseModel)

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"

_MOST_BYTES = 1 << 27  # the largest vocabularies of public models take a third of it
_MOST_SMALL_BYTES = 1 << 24
_MOST_PARTS = 64
_LONGEST_TOKEN = 512
_MOST_GROWTH = 1 << 12
_MOST_CHARACTERS = 1 << 22  # of all added tokens, normalised: each takes a hundred bytes in the library's trie

# Branches of single characters and classes, one of them repeated: the work grows with the square of a text at most.
_ONE = r"(?:\\[pP]\{\^?\w+\}|\\[^1-9gkpPQ]|\[\^?\]?(?:\\.|[^\[\]\\])*\]|[^\\\[\](){}*+?|])"
_REPEATED = rf"{_ONE}(?:[*+?]|\{{\d*,?\d*\}})[+?]?"
_BRANCH = rf"{_ONE}*(?:{_REPEATED}{_ONE}*)?"
_SIMPLE = re.compile(rf"{_BRANCH}(?:\|{_BRANCH})*", re.DOTALL)


class _Added(BaseModel):
    content: str
    normalized: bool = True


class _Tokenizer(BaseModel):
    normalizer: Any = None
    decoder: Any = None
    added_tokens: list[_Added] = []


class _Settings(BaseModel):
    added_tokens_decoder: dict[str, _Added] = {}
    fast_tokenizer_files: list[str] = []


def require_bounded(find: Callable[[str], Path | None]) -> None:
    """See to it that loading a tokenizer, and decoding with it, end.

    Args:
        find: the file of the model that has a name; None where there is none.

    Raises:
        QaromaError: a tokenizer beyond the bounds above.
        ValueError: a damaged file.
    """
    settings = _Settings()
    if (file := find(_SETTINGS)) is not None:
        settings = _read(_Settings, file, _MOST_SMALL_BYTES)
    for name in (_FILE, *settings.fast_tokenizer_files):
        if not inside(name):
            raise QaromaError(f"{file} names '{name[:120]}', which lies outside its folder; do not use that model")
        if (path := find(name)) is not None:
            tokenizer = _read(_Tokenizer, path, _MOST_BYTES)
            added = [*tokenizer.added_tokens, *settings.added_tokens_decoder.values()]
            wrong = _beyond(tokenizer, added)
            if wrong:
                raise QaromaError(f"{path} has {wrong}, which could take for ever; do not use that model")


def _read(kind: type[T], file: Path, most: int) -> T:
    """What is wanted of a file; pydantic passes over the vocabulary ten times as fast as json reads it."""
    if file.stat().st_size > most:
        raise QaromaError(f"{file} is larger than {most >> 20} MiB, as no tokenizer is; do not use that model")
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file.name}: {'.'.join(map(str, first['loc']))} {first['msg']}") from error


def _beyond(tokenizer: _Tokenizer, added: list[_Added]) -> str:
    """What goes beyond the bounds; empty where nothing does."""
    parts = [*_parts(tokenizer.normalizer), *_parts(tokenizer.decoder)]
    if len(parts) > _MOST_PARTS:
        return f"a normaliser and a decoder of {len(parts)} parts"
    for part in parts:
        expression = _of(part.get("pattern"), "Regex")
        if expression is not None and not _SIMPLE.fullmatch(expression):
            return f"the regular expression '{expression[:80]}' in its normaliser or decoder"
    growth = max(_growth(tokenizer.normalizer), _growth(tokenizer.decoder))
    if growth > _MOST_GROWTH:
        return f"a normaliser or decoder that makes a text {growth:.3g} times as long"
    longest = max((len(token.content) for token in added), default=0)
    if longest > _LONGEST_TOKEN:
        return f"an added token of {longest} characters"
    characters = sum(len(token.content) * (growth if token.normalized else 1) for token in added)
    return f"added tokens of {characters:.3g} characters" if characters > _MOST_CHARACTERS else ""


def _parts(value: Any) -> list[dict[str, Any]]:
    """The steps of a normaliser or decoder, those of sequences in it one by one."""
    if not isinstance(value, dict):
        return []
    inner = [value[key] for key in ("normalizers", "decoders") if isinstance(value.get(key), list)]
    return [value, *(part for steps in inner for step in steps for part in _parts(step))]


def _growth(value: Any) -> float:
    """How many times as long a text may be after a normaliser or decoder."""
    growth = 1.0
    for part in _parts(value):
        content = str(part.get("content", ""))
        match part.get("type"):
            case "Replace":
                length = len(_of(part.get("pattern"), "String") or "") or 1
                empty = _of(part.get("pattern"), "Regex") is not None  # matches between all characters
                growth *= max(1.0, len(content) / length + empty)
            case "Prepend":
                growth *= 1 + len(str(part.get("prepend", "")))
            case "ByteLevel":
                growth *= 2
            case "Precompiled":
                mapped = base64.b64decode(str(part.get("precompiled_charsmap") or ""))
                growth *= max(1, *map(len, mapped.split(b"\0")))
    return growth


def _of(pattern: Any, kind: str) -> str | None:
    found = pattern.get(kind) if isinstance(pattern, dict) else None
    return found if isinstance(found, str) else None
