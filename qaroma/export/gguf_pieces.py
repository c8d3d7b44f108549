"""A SentencePiece vocabulary as GGUF's metadata: pieces with scores, bytes for what is not among them.

llama.cpp joins the two neighbours whose piece has the highest score. transformers keeps the same order as a list of
merges, so that a piece's score is the negative place of its first merge there.
"""

from __future__ import annotations

import re
from typing import Any

from qaroma.errors import QaromaError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNJOINED = -1e9  # of pieces that no merge makes


def is_pieces(state: dict[str, Any]) -> bool:
    """Whether a fast tokenizer's state is that of a converted SentencePiece model: BPE that falls back to bytes."""
    return state["model"]["type"] == "BPE" and bool(state["model"].get("byte_fallback"))


def space_before(state: dict[str, Any], prompt: str) -> bool:
    """Whether a space is put before the text, and for llama.cpp before all text that follows a special token.

    Args:
        state: of the tokenizer.
        prompt: a rendered one, without the BOS that the tokenizer adds: where the space stands before the first text
            alone, it decides.

    Raises:
        QaromaError: spaces are written in another way than SentencePiece does.
    """
    normaliser, cut = state.get("normalizer"), state.get("pre_tokenizer")
    steps = [] if normaliser is None else normaliser.get("normalizers", [normaliser])
    kinds = [step["type"] for step in steps]
    if cut is not None and cut["type"] == "Metaspace" and not kinds:
        scheme = cut.get("prepend_scheme")
        if scheme == "first":
            return not any(prompt.startswith(entry["content"]) for entry in state["added_tokens"])
        return str(scheme) == "always"
    if kinds in (["Replace"], ["Prepend", "Replace"]) and (cut is None or cut["type"] == "Split"):
        return "Prepend" in kinds
    raise QaromaError(
        f"the base's tokenizer writes spaces in a way that llama.cpp has not ({', '.join(kinds) or 'nothing'} before "
        f"{cut['type'] if cut else 'nothing'}); type: --format gguf-adapter, or --format merged"
    )


def add_pieces(writer: Any, state: dict[str, Any], tokens: list[str], types: list[int], prompt: str) -> None:
    """Write pieces, scores and kinds.

    Args:
        writer: gguf's writer.
        state: of the tokenizer.
        tokens, types: of every row of the embeddings; bytes and the unknown token get their own type here.
        prompt: see :func:`space_before`.

    Raises:
        QaromaError: as :func:`space_before`.
    """
    from gguf import TokenType

    scores = _scores(state)
    for index, token in enumerate(tokens):
        if types[index] == TokenType.NORMAL and _BYTE.fullmatch(token):
            types[index] = int(TokenType.BYTE)
        elif token == state["model"].get("unk_token"):
            types[index] = int(TokenType.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, _UNJOINED) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(space_before(state, prompt))


def _scores(state: dict[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for place, pair in enumerate(state["model"]["merges"]):
        scores.setdefault("".join(pair.split(" ", 1) if isinstance(pair, str) else pair), -float(place))
    return scores
