"""Rendered text to token ids, with one BOS where the base expects one and no space that nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from qaroma.errors import QaromaError
from qaroma.text.bounded_calls import BeyondBounds, bounded_call

# Tokenizers take a microsecond and some 300 bytes for a character.
_SECONDS, _SECONDS_A_CHARACTER = 20.0, 4e-5
_BYTES, _BYTES_A_CHARACTER = 1 << 30, 1000
_AT_ONCE = 1 << 20


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, with exactly one BOS where the base expects one.

    A BOS is expected where the text begins with it already or the tokenizer adds one by itself.
    That a tokenizer merely names one is no reason: ChatML's names ``<|im_start|>``. Special tokens
    spelt out in the data become special tokens, as in every other tool.

    Args:
        tokenizer: The base's tokenizer.
        texts: Whole texts, each from its beginning.

    Returns:
        One list of ids for each text, without padding or truncation.
    """
    bos = added_bos(tokenizer)
    ids = token_ids(tokenizer, texts)
    return ids if bos is None else [row if row[:1] == [bos] else [bos, *row] for row in ids]


def tokenize_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one.

    Tokenised alone, a text may get a space before it (SentencePiece) that nobody wrote. So it is
    tokenised behind a short lead-in whose tokens are then taken off; of several lead-ins, the first
    whose tokens stay what they are alone.

    Args:
        tokenizer: The base's tokenizer.
        text: The continuation.

    Returns:
        The ids of the continuation alone.
    """
    for lead in ("\n", ":", ")", "x"):
        alone, together = token_ids(tokenizer, [lead, lead + text])
        if together[: len(alone)] == alone:
            return together[len(alone) :]
    return token_ids(tokenizer, [text])[0]


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token if the tokenizer puts one before every text, else None."""
    if tokenizer.bos_token_id is None:
        return None
    bos = int(tokenizer.bos_token_id)
    adds = encode(tokenizer, ["a"]).input_ids[0][:1] == [bos] and token_ids(tokenizer, ["a"])[0][:1] != [bos]
    return bos if adds else None


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they stand, without any token that the tokenizer adds by itself."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    # verbose=False: a text longer than the model's context is dealt with later, not warned of.
    parts = (encode(tokenizer, part, verbose=False, **options)["input_ids"] for part in _parts(texts))
    return [list(row) for part in parts for row in part]


def encode(tokenizer: PreTrainedTokenizerBase, *columns: list[str], **options: Any) -> BatchEncoding:
    """As calling the tokenizer, which is a program of somebody's: a pattern of its may take for ever.

    Args:
        tokenizer: of a base.
        columns: the texts; of pairs, the first and the second ones.
        options: of the tokenizer's own call.

    Raises:
        QaromaError: it takes too long or too much memory, or breaks down.
    """
    characters = sum(len(text) for column in columns for text in column)
    try:
        return bounded_call(
            lambda: tokenizer(*columns, **options),
            seconds=_SECONDS + _SECONDS_A_CHARACTER * characters,
            memory=_BYTES + _BYTES_A_CHARACTER * characters,
        )
    except BeyondBounds as error:
        raise QaromaError(
            f"the base's tokenizer cannot encode a text of {characters:,} characters ({error}); "
            "do not use that model, or copy its tokenizer files anew from where it was published"
        ) from error


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in parts of a length at which an end is told within a minute."""
    part: list[str] = []
    length = 0
    for text in texts:
        if part and length + len(text) > _AT_ONCE:
            yield part
            part, length = [], 0
        part.append(text)
        length += len(text)
    if part:
        yield part
