"""Showing an example as the model sees it, with the trained tokens marked."""

from __future__ import annotations

from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qaroma.data.encode import IGNORED, Example

TRAINED_STYLE = "bold green"
MARKS = ("⟦", "⟧")


def preview(example: Example, tokenizer: PreTrainedTokenizerBase, name: str = "", *, most: int | None = None) -> Text:
    """An example decoded, what is trained in green and between ⟦ and ⟧.

    Args:
        example: The example.
        tokenizer: The base's tokenizer.
        name: What it is called in the heading; empty for one alone.
        most: Of each piece that is all trained or all not so many characters are shown; None shows all.

    Returns:
        A heading with the counts and the origin, then the text with its special tokens. The marks show
        without colour too.
    """
    origin = f", from {example.origin}" if example.origin else ""
    factors = {w for w, label in zip(example.loss_weights, example.labels, strict=False) if label != IGNORED}
    weighted = f", loss times {min(factors):g} to {max(factors):g}" if factors else ""
    called = f"{name}: " if name else ""
    shown = Text(f"{called}{example.tokens} tokens, {example.trained} trained{weighted}{origin}\n", style="dim")
    for trained, piece in trained_pieces(example, tokenizer, most=most):
        if trained:
            shown.append(f"{MARKS[0]}{piece}{MARKS[1]}", style=TRAINED_STYLE)
        else:
            shown.append(piece, style="not dim")
    return shown


def _cut(text: str, most: int) -> str:
    """Both ends of a text, and how much is left out between them."""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return f"{text[: most // 2]} [... {left_out:,} characters, --full shows them ...] {text[-(most - most // 2) :]}"


def trained_pieces(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None
) -> list[tuple[bool, str]]:
    """The decoded text in pieces that are all trained or all not.

    Args:
        example: The example.
        tokenizer: The base's tokenizer.
        most: As :func:`preview` takes it.

    Returns:
        Pairs of (trained, text); the texts joined are the whole text, where none is cut.
    """
    pieces: list[tuple[bool, str]] = []
    end, before = 0, ""
    for trained, group in groupby(example.labels, key=lambda label: label != IGNORED):
        end += len(list(group))
        # Decoded from the start each time: alone, a piece would lose its leading space in SentencePiece.
        text = str(
            tokenizer.decode(example.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        piece = text[len(before) :]
        pieces.append((trained, piece if most is None else _cut(piece, most)))
        before = text
    return pieces
