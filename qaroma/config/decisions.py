"""What a run decides from: facts of the base and the data; and a decision, with the reason printed beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Decide = Callable[[str, Any, str], Any]  # key, value and reason; gives the value that stands


@dataclass(frozen=True)
class ModelFacts:
    """What the base says.

    Attributes:
        component_parameters: N + M of one rank-one component, summed over all adapted layers.
        width: N, the median over layers.
        weight_std: standard deviation of a layer's elements, the median over some layers.
    """

    component_parameters: int
    width: int
    weight_std: float


@dataclass(frozen=True)
class DataFacts:
    """What the data says, and the base that trains on it.

    Attributes:
        rows: to train on.
        lengths: of all rows, in tokens.
        model_max_length: the model's longest input, where it has one.
        validation_rows: to validate on.
        trained_bits: what the training rows have to tell, copies counted once; None where nobody counted.
        model: of the base; None where it has not been looked at, for all that does not depend on it.
    """

    rows: int
    lengths: Sequence[int]
    model_max_length: int | None
    validation_rows: int = 0
    trained_bits: float | None = None
    model: ModelFacts | None = None


@dataclass(frozen=True)
class Decision:
    """One resolved value: dotted key, value, and why."""

    key: str
    value: Any
    reason: str
