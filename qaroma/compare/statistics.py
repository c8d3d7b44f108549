"""Means, spreads and differences over seeds; numbers in, numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The mean of one method less that of another.

    Attributes:
        mean: of the differences.
        error: standard error of that mean; None where there are too few runs to tell.
        paired: whether runs of the same seed were compared, which leaves out what a seed does to both.
        count: pairs, or the smaller number of runs.
    """

    mean: float
    error: float | None
    paired: bool
    count: int


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Difference of two methods' means, with its standard error.

    Paired by seed where at least two seeds are common (seeds that only one of them has are left out):
    ``sd(d_i) / sqrt(n)``. Otherwise that of independent samples (Welch): ``sqrt(s1^2 / n1 + s2^2 / n2)``.

    Args:
        ours, theirs: seed -> value; neither is empty.
    """
    common = sorted(set(ours) & set(theirs))
    if len(common) >= 2:
        differences = [ours[seed] - theirs[seed] for seed in common]
        spread = deviation(differences)
        assert spread is not None
        return Difference(mean(differences), spread / math.sqrt(len(common)), True, len(common))
    left, right = list(ours.values()), list(theirs.values())
    spreads = deviation(left), deviation(right)
    error = None
    if spreads[0] is not None and spreads[1] is not None:
        error = math.sqrt(spreads[0] ** 2 / len(left) + spreads[1] ** 2 / len(right))
    return Difference(mean(left) - mean(right), error, False, min(len(left), len(right)))
