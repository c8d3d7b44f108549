"""Texts and pairs of texts with a label: what classification and regression are trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from qaroma.data.forms import BadRow, report_bad_rows
from qaroma.data.sources import Row, RowSet
from qaroma.data.split import held_out_keys, repeated
from qaroma.data.tokens import encode
from qaroma.errors import QaromaError

Kind = Literal["classification", "regression"]

# Keys of one text or of a pair, as GLUE and the commonest data sets on the hub have them; the first that fits.
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
SINGLES = ("sentence", "text", "review", "content", "question")
LABELS = ("label", "labels", "score", "class", "category", "target")
# Numbers alone: of what str.isdigit() lets pass, some have no value (a superscript two).
_WHOLE = re.compile(r"-?[0-9]{1,18}")
MOST_CLASSES = 200  # more different labels than this are figures, or a mistake

_BATCH = 512


@dataclass(frozen=True)
class LabelledExample:
    """One text or pair, tokenised, and its label.

    Attributes:
        input_ids: Token ids with the base's special tokens, of length L.
        token_type_ids: Aligned with them where the base tells the texts of a pair apart; else None.
        label: Index of the class, or the figure.
        origin: ``file:line`` of its row.
        weight: How often it appears in an epoch.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    label: float
    origin: str = ""
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)


@dataclass(frozen=True)
class LabelledSet:
    """Examples, and how they were read.

    Attributes:
        examples: In the order of the rows.
        fields: The keys of the text or of the pair.
        label_field: The key of the label.
        labels: Names of the classes by their index; empty for regression.
        bad: ``file:line: what is wrong`` of the rows left out.
        notes: Sentences to print.
    """

    examples: list[LabelledExample]
    fields: tuple[str, ...]
    label_field: str
    labels: tuple[str, ...] = ()
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(example.input_ids) for example in self.examples]


def encode_labelled(
    rows: RowSet,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    token_types: bool = True,
    skip_bad: bool = False,
) -> LabelledSet:
    """Read texts and labels out of rows and tokenise them.

    Args:
        rows: What :func:`qaroma.data.sources.read_rows` returned.
        tokenizer: The base's tokenizer.
        kind: What the label is: a class or a figure.
        labels: Names of the classes where they are known already; None takes them from the rows.
        max_length: Longer texts are cut (of a pair, the longer one first); None cuts none.
        token_types: Whether the base takes ``token_type_ids``; many tokenizers give them either way.
        skip_bad: Leave bad rows out instead of raising.

    Returns:
        The examples; none is ever dropped for its length.

    Raises:
        QaromaError: No text or label is found, a label is unknown or no figure, or nothing is left.
    """
    if not rows.rows:
        raise report_bad_rows(rows.bad, len(rows.bad))
    fields, label_field = _find_fields(rows.rows[0])
    read, bad = _read(rows.rows, fields, label_field, kind)
    _require_good(rows, bad, skip_bad and bool(read))
    names = tuple(labels) if labels is not None else _class_names([label for _, _, label in read], kind)
    known = {name: index for index, name in enumerate(names)}
    kept = []
    for row, texts, label in read:
        if kind == "classification" and str(label) not in known:
            bad.append(f"{row.place}: the label {label!r} is none of {', '.join(names)}")
        else:
            kept.append((row, texts, float(known[str(label)] if kind == "classification" else label)))
    _require_good(rows, bad, skip_bad and bool(kept))
    examples = _tokenise(kept, tokenizer, max_length, token_types)
    return LabelledSet(examples, fields, label_field, names, [*rows.bad, *bad], list(rows.notes))


def takes_token_types(model_config: Any) -> bool:
    """Whether a base tells the texts of a pair apart by ``token_type_ids``."""
    return (getattr(model_config, "type_vocab_size", None) or 0) > 1


def split_labelled(data: LabelledSet, *, share: float, at_most: int, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """Set a random part of the rows aside for validation, and give the rest its weights.

    Copies are made after the split, and a file that is named twice gives its rows once to validate on: no row
    is on both sides.

    Args:
        data: The examples.
        share: Share of the rows set aside; 0 sets none aside.
        at_most: Greatest number of rows set aside.
        seed: Seed of the choice.

    Returns:
        Training and validation examples, each in their former order.
    """
    chosen = held_out_keys([e.origin for e in data.examples], share=share, at_most=at_most, seed=seed)
    train = repeated([e for e in data.examples if e.origin not in chosen], seed=seed)
    held_out = {e.origin: e for e in data.examples if e.origin in chosen}
    return replace(data, examples=train), replace(data, examples=list(held_out.values()))


def _require_good(rows: RowSet, bad: Sequence[str], may_skip: bool) -> None:
    found = [*rows.bad, *bad]
    if found and not may_skip:
        raise report_bad_rows(found, len(rows.rows) + len(rows.bad))


def _find_fields(row: Row) -> tuple[tuple[str, ...], str]:
    """The keys of the text or pair, and of the label, from one row."""
    if not isinstance(row.value, Mapping):
        raise QaromaError(f"{row.place} is plain text; expected an object with a text and a label")
    keys = set(row.value)
    texts: tuple[str, ...] | None = next((pair for pair in PAIRS if keys.issuperset(pair)), None)
    texts = texts or next(((key,) for key in SINGLES if key in keys), None)
    label = next((key for key in LABELS if key in keys), None)
    if texts is None or label is None:
        missing = "no text" if texts is None else "no label"
        expected = " or ".join(["sentence1 and sentence2", *SINGLES] if texts is None else LABELS)
        raise QaromaError(
            f"{row.place} has {missing} under a known key; got {', '.join(map(str, row.value))}; "
            f"expected {expected}. Rename the columns"
        )
    return texts, label


def _read(
    rows: Sequence[Row], fields: tuple[str, ...], label_field: str, kind: Kind
) -> tuple[list[tuple[Row, tuple[str, ...], Any]], list[str]]:
    """Texts and label of every good row, and what is wrong with the others."""
    read, bad = [], []
    for row in rows:
        try:
            read.append((row, *_texts_and_label(row, fields, label_field, kind)))
        except BadRow as error:
            bad.append(f"{row.place}: {error}")
    return read, bad


def _texts_and_label(
    row: Row, fields: tuple[str, ...], label_field: str, kind: Kind
) -> tuple[tuple[str, ...], str | float]:
    if not isinstance(row.value, Mapping):
        raise BadRow("plain text; expected an object with a text and a label")
    texts = tuple(row.value.get(key) for key in fields)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow(f"the field '{fields[0]}' or another text is missing or blank")
    label = row.value.get(label_field)
    if label is None or label == "":
        raise BadRow(f"the field '{label_field}' is missing")
    if kind == "classification":
        if label in (-1, "-1"):
            raise BadRow("the label is -1, as in test sets without labels; give a set with labels")
        return texts, str(label)  # type: ignore[return-value]
    try:
        value = float(label)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise BadRow(f"the label {label!r} is no number; expected one, or --task classification")
    return texts, value  # type: ignore[return-value]


def _class_names(labels: Sequence[Any], kind: Kind) -> tuple[str, ...]:
    """All labels, whole numbers in their order, other names in the alphabet's; none for regression."""
    if kind == "regression":
        return ()
    names = sorted(set(labels), key=lambda name: (0, int(name), "") if _WHOLE.fullmatch(name) else (1, 0, name))
    if len(names) < 2:
        raise QaromaError(f"all rows have the label {', '.join(names) or 'none'}; expected at least two classes")
    if len(names) > MOST_CLASSES:
        raise QaromaError(
            f"got {len(names)} different labels, for instance {', '.join(names[:5])}; expected at most {MOST_CLASSES} "
            "classes. If they are figures, type --task regression"
        )
    return tuple(names)


def _tokenise(
    rows: Sequence[tuple[Row, tuple[str, ...], float]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    token_types: bool,
) -> list[LabelledExample]:
    examples: list[LabelledExample] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        columns = [list(column) for column in zip(*(texts for _, texts, _ in part), strict=True)]
        limited: Any = {"truncation": "longest_first" if len(columns) == 2 else True, "max_length": max_length}
        encoded = encode(tokenizer, *columns, **(limited if max_length is not None else {"verbose": False}))
        kinds = (encoded.get("token_type_ids") if token_types else None) or [None] * len(part)
        for (row, _, label), ids, types in zip(part, encoded["input_ids"], kinds, strict=True):
            examples.append(LabelledExample(ids, types, label, row.place, row.weight))
    return examples
