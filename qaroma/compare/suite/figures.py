"""Numbers of the suite's tables: paired deficits in one unit, their mean over beds, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qaroma.compare.statistics import deviation, mean
from qaroma.compare.suite.beds import Bed


@dataclass(frozen=True)
class Deficit:
    """How much worse growth is than another arm, paired by seed.

    Attributes:
        mean: in points (hundredths of the metric, or per cent of the other's loss); positive is worse.
        error: standard error of the mean; None for one pair.
        count: pairs.
    """

    mean: float
    error: float | None
    count: int

    @property
    def too_much(self) -> bool:
        """Worse by a point and by two standard errors at once."""
        return self.mean > 1.0 and (self.error is None or self.mean > 2 * self.error)

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.mean:+.2f}{spread}"


def deficit(bed: Bed, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Deficit | None:
    """The mean over common seeds.

    Args:
        bed: says which way its score goes.
        ours, theirs: seed -> score; infinite for a loss that diverged.

    Returns:
        None where no seed is common.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    if bed.lower_is_better:
        points = [100 * (ours[seed] - theirs[seed]) / theirs[seed] for seed in seeds]
    else:
        points = [100 * (theirs[seed] - ours[seed]) for seed in seeds]
    spread = deviation(points)
    return Deficit(mean(points), None if spread is None else spread / math.sqrt(len(points)), len(points))


def overall(deficits: Sequence[Deficit]) -> Deficit | None:
    """The mean over beds, each counting once, with the standard error that follows from theirs."""
    if not deficits:
        return None
    errors = [d.error for d in deficits if d.error is not None]
    error = math.sqrt(sum(e * e for e in errors)) / len(deficits) if len(errors) == len(deficits) else None
    return Deficit(mean([d.mean for d in deficits]), error, len(deficits))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks, ties sharing the mean of theirs; 0 where one of them is constant."""
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    middle = (len(x) - 1) / 2
    across = sum((a - middle) * (b - middle) for a, b in zip(ranks_x, ranks_y, strict=True))
    spread = math.sqrt(sum((a - middle) ** 2 for a in ranks_x) * sum((b - middle) ** 2 for b in ranks_y))
    return across / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in values}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Geometric mean of ratios, and the factor by which it may be off (two standard errors)."""
    logs = [math.log(value) for value in values]
    spread = deviation(logs)
    return math.exp(mean(logs)), math.exp(2 * spread / math.sqrt(len(logs))) if spread is not None else math.inf
