"""The figures of merit, one row each: which way they go, which tasks they judge, and how they are printed."""

from __future__ import annotations

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
    """

    name: str
    higher_is_better: bool = True
    judges: tuple[str, ...] = ()
    percent: bool = False

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

    def text(self, value: float) -> str:
        """A value as it is printed."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


_ROWS = (
    Metric("loss", higher_is_better=False, judges=("causal-lm", "preference")),
    Metric("perplexity", higher_is_better=False),
    # The first metric of a task is the one that it is judged by where nobody asks for another.
    Metric("accuracy", judges=("classification", "preference")),
    Metric("margin", judges=("preference",)),
    Metric("f1", judges=("classification",)),
    Metric("matthews", judges=("classification",)),
    Metric("pearson", judges=("regression",)),
    Metric("spearman", judges=("regression",)),
    Metric("exact_match", percent=True),
)

METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}


def metric_facts(name: str) -> Metric:
    """The row of a metric; of one that only another version knows, larger is taken to be better."""
    return METRICS.get(name) or Metric(name)


def metrics_of(task: str) -> tuple[str, ...]:
    """Names of the metrics that a task is judged by, first the one that chooses its best adapter."""
    return tuple(name for name, row in METRICS.items() if task in row.judges)
