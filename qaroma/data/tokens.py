"""Rendered text to token ids, with one BOS where the base expects one and no space that nobody wrote."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


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
    adds = tokenizer("a").input_ids[:1] == [bos] and token_ids(tokenizer, ["a"])[0][:1] != [bos]
    return bos if adds else None


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is dealt with later, not warned of.
    batch = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [list(row) for row in batch["input_ids"]]
