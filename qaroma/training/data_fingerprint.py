"""What a run was trained on, as a digest: rows that changed make another run."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from qaroma.errors import QaromaError

# Where a row lies and how it read as a conversation do not change what is trained; the reference follows from the rest.
_NOT_TRAINED = ("origin", "conversation", "reference")


def data_fingerprint(train: Sequence[Any], validation: Sequence[Any]) -> dict[str, Any]:
    """Number and digest of the encoded examples, in their order.

    Args:
        train, validation: dataclasses of numbers and lists of numbers, such as
            :class:`qaroma.data.example.Example`, or of those.
    """
    return {"training": _of(train), "validation": _of(validation)}


def require_same_data(then: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """See to it that a run goes on with the data that it was begun with.

    Args:
        then, now: of :func:`data_fingerprint`.
        run: its directory, for the message.

    Raises:
        QaromaError: other rows; says whether their number or their content changed.
    """
    for part, before in then.items():
        count, known = now[part]["examples"], before["examples"]
        if now[part] == before:
            continue
        how = (
            f"{known} examples then, {count} now"
            if count != known
            else f"{count} examples as before, but of another content or in another order"
        )
        raise QaromaError(
            f"cannot resume {run}: its {part} data changed since ({how}). Put the rows back as they were, or begin "
            f"a new run that goes on from this one: --output OTHER --set model.adapter={run}/adapter"
        )


def _of(examples: Sequence[Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        for numbers in _numbers(example):
            digest.update(array("d", [len(numbers), *numbers]).tobytes())
    return {"examples": len(examples), "sha256": digest.hexdigest()}


def _numbers(example: Any) -> Iterator[Sequence[float]]:
    for field in fields(example):
        if field.name in _NOT_TRAINED:
            continue
        value = getattr(example, field.name)
        if is_dataclass(value):
            yield from _numbers(value)
            continue
        yield () if value is None else value if isinstance(value, (list, tuple)) else (value,)
