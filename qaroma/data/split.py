"""Which examples are set aside for validation, and how often the others appear in an epoch."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from qaroma.config.presets import FEWEST_VALIDATION_ROWS
from qaroma.data.encode import Encoded
from qaroma.data.example import Example, Pair
from qaroma.errors import QaromaError

_ENOUGH_ROWS = 4 * FEWEST_VALIDATION_ROWS  # from so many on, a share that is smaller is not taken at its word


class Weighted(Protocol):
    """An example of any task that knows its row and how often it appears in an epoch."""

    @property
    def origin(self) -> str:
        """``file:line`` of its row."""

    @property
    def weight(self) -> float:
        """How often it appears in an epoch."""


_Weighted = TypeVar("_Weighted", bound=Weighted)
_E = TypeVar("_E", Example, Pair)


def held_out_keys(keys: Iterable[Hashable], *, share: float, at_most: int, seed: int) -> set[Hashable]:
    """Choose what is set aside for validation; something always remains to train on.

    Args:
        keys: Of the examples, in their order; those with the same key stay together.
        share: Share of the different keys, raised to :data:`FEWEST_VALIDATION_ROWS` where there are four times as
            many; 0 chooses none.
        at_most: Greatest number of them.
        seed: Seed of the choice.

    Returns:
        The keys chosen.
    """
    groups = list(dict.fromkeys(keys))
    least = FEWEST_VALIDATION_ROWS if share and len(groups) >= _ENOUGH_ROWS else 0
    count = min(at_most, max(least, int(share * len(groups))), len(groups) - 1)
    return set(random.Random(seed).sample(groups, max(count, 0)))


def repeated(examples: Sequence[_Weighted], *, seed: int) -> list[_Weighted]:
    """Repeat each example as its weight says: 2 is twice, 0.5 a random half of the file, 1.5 both.

    Args:
        examples: In any order; those of one file and weight are drawn from together.
        seed: Seed of the choice of the fractional part.

    Returns:
        The examples of an epoch, copies side by side.

    Raises:
        QaromaError: The weights are so small that none is left.
    """
    files: dict[tuple[str, float], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        files[example.origin.rpartition(":")[0], example.weight].append(index)
    copies = [0] * len(examples)
    chooser = random.Random(seed)
    for (_, weight), indices in files.items():
        extra = set(chooser.sample(indices, round((weight - int(weight)) * len(indices))))
        for index in indices:
            copies[index] = int(weight) + (index in extra)
    if examples and not any(copies):
        largest = max(example.weight for example in examples)
        raise QaromaError(
            f"the weights leave none of {len(examples)} examples (the largest is {largest:g}); "
            "type a larger one, as --data FILE:1"
        )
    return [example for example, count in zip(examples, copies, strict=True) for _ in range(count)]


def split_validation(
    encoded: Encoded[_E], *, share: float = 0.05, at_most: int = 500, seed: int = 0
) -> tuple[Encoded[_E], Encoded[_E]]:
    """Set a random part of the rows aside for validation, and give the rest its weights.

    All examples of one row fall on the same side, and copies are made after the split, so that no row
    is in both. Chunks of plain text count as rows.

    Args:
        encoded: The examples.
        share: Share of the rows set aside; 0 sets none aside.
        at_most: Greatest number of rows set aside.
        seed: Seed of the choice.

    Returns:
        Training and validation examples, each in their former order; the training ones as :func:`weigh`
        repeats them.
    """
    keys: list[Hashable] = [e.origin if e.conversation else tuple(e.sequences[""].input_ids) for e in encoded.examples]
    chosen = held_out_keys(keys, share=share, at_most=at_most, seed=seed)
    pairs = list(zip(keys, encoded.examples, strict=True))
    train = replace(encoded, examples=[example for key, example in pairs if key not in chosen])
    held_out: dict[Hashable, list[_E]] = defaultdict(list)
    for key, example in pairs:
        if key in chosen and example not in held_out[key]:
            held_out[key].append(example)
    validation = replace(encoded, examples=[example for group in held_out.values() for example in group])
    return weigh(train, seed=seed), validation


def weigh(encoded: Encoded[_E], *, seed: int = 0) -> Encoded[_E]:
    """Repeat each example as its weight says (:func:`repeated`).

    Args:
        encoded: The examples.
        seed: Seed of the choice of the fractional part.

    Returns:
        The examples of an epoch, all with weight 1, copies side by side.
    """
    epoch = repeated(encoded.examples, seed=seed)
    return replace(encoded, examples=[replace(example, weight=1.0) for example in epoch])
