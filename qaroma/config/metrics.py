"""The figures of merit, one row each: which way they go, which tasks they judge, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

LabelMetric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]  # what evaluation.metric may be


@dataclass(frozen=True)
class Metric:
    """One figure of merit.

    Attributes:
        name: as validations log it.
        higher_is_better: which way it goes.
        judges: tasks that are judged by it.
        percent: whether it is a share from 0 to 1 that is printed in per cent.
        estimates: what it is of a sample, where its standard error follows from its value.
    """

    name: str
    higher_is_better: bool = True
    judges: tuple[str, ...] = ()
    percent: bool = False
    estimates: Literal["share", "correlation"] | None = None

    @property
    def direction(self) -> Literal["higher", "lower"]:
        """Which values are better, as a word."""
        return "higher" if self.higher_is_better else "lower"

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one, and not as good."""
        return value > other if self.higher_is_better else value < other

    def best(self, points: Iterable[tuple[int, float]]) -> tuple[int, float]:
        """The best of some pairs of step and value; the first of equals."""
        choose = max if self.higher_is_better else min
        return choose(points, key=lambda point: point[1])

    def error(self, value: float, examples: int) -> float:
        """Standard error of a value over so many examples; 0 where it does not follow from the value."""
        if self.estimates is None or examples < 2:
            return 0.0
        if self.estimates == "share":
            return math.sqrt(max(0.0, value * (1 - value)) / examples)
        return (1 - value * value) / math.sqrt(examples - 1)

    def text(self, value: float) -> str:
        """A value as it is printed."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


_ROWS = (
    Metric("loss", higher_is_better=False, judges=("causal-lm", "preference")),
    Metric("perplexity", higher_is_better=False),
    # The first metric of a task is the one that it is judged by where nobody asks for another.
    Metric("accuracy", judges=("classification", "preference"), estimates="share"),
    Metric("margin", judges=("preference",)),
    Metric("f1", judges=("classification",), estimates="share"),
    Metric("matthews", judges=("classification",), estimates="correlation"),
    Metric("pearson", judges=("regression",), estimates="correlation"),
    Metric("spearman", judges=("regression",), estimates="correlation"),
    Metric("exact_match", percent=True),
)

METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}


def metric_facts(name: str) -> Metric:
    """The row of a metric; of one that only another version knows, larger is taken to be better."""
    return METRICS.get(name) or Metric(name)


def metrics_of(task: str) -> tuple[str, ...]:
    """Names of the metrics that a task is judged by, first the one that chooses its best adapter."""
    return tuple(name for name, row in METRICS.items() if task in row.judges)
