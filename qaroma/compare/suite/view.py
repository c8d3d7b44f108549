"""What tables are made from, and the averages that they share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qaroma.compare.statistics import mean
from qaroma.compare.suite.beds import Bed
from qaroma.compare.suite.cells import Cell, Figures, Results
from qaroma.compare.suite.oracle import Loss

Rows = tuple[list[list[str]], list[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class View:
    """What tables are made from.

    Attributes:
        beds: those of this suite.
        results: the cells that are done.
        ours: the arm that is judged.
        seeds: fresh ones for every bed; None is each bed's own.
    """

    beds: Sequence[Bed]
    results: Results
    ours: str
    seeds: tuple[int, ...] | None

    def seeds_of(self, bed: Bed) -> tuple[int, ...]:
        return self.seeds or bed.fresh_seeds

    def in_oracle(self) -> list[Bed]:
        return [bed for bed in self.beds if bed.in_oracle]

    def of_kind(self, kind: str) -> list[Bed]:
        return [bed for bed in self.beds if bed.kind == kind]

    def loss(self, bed: Bed) -> Loss:
        """A cell's score turned so that lower is better; infinite where the run diverged."""

        def of(cell: Cell) -> float | None:
            figures = self.results.get(cell)
            if figures is None:
                return None
            if figures["score"] is None:
                return math.inf
            return float(figures["score"]) * (1 if bed.lower_is_better else -1)

        return of

    def done(self, cells: Mapping[int, Cell]) -> dict[int, Figures]:
        """The figures of those cells that are done, by seed."""
        found = {seed: self.results.get(cell) for seed, cell in cells.items()}
        return {seed: figures for seed, figures in found.items() if figures is not None}


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: its heading.
        plan: the cells that it wants; those that are done may be among them.
        rows: the heads of its columns, its rows, and sentences below it; and the same as values for JSON.
    """

    title: str
    plan: Callable[[View], list[Cell]]
    rows: Callable[[View], Rows]


def ours_cells(view: View, bed: Bed, *, more: str = "", factor: float = 1.0) -> dict[int, Cell]:
    """Growth on every fresh seed of a bed."""
    return {seed: Cell(bed.name, view.ours + more, seed, factor=factor) for seed in view.seeds_of(bed)}


def scores(figures: Mapping[int, Figures], key: str = "score") -> dict[int, float]:
    """One figure of each seed; a run that diverged is infinitely bad, whichever way the metric goes."""
    return {seed: math.inf if found[key] is None else float(found[key]) for seed, found in figures.items()}


def average(figures: Mapping[int, Figures], key: str) -> float:
    """The mean of a figure over the seeds that have it; not a number where none does."""
    values = [found[key] for found in figures.values() if found.get(key) is not None]
    return mean(values) if values else math.nan


def endings(figures: Mapping[int, Figures]) -> str:
    """How the runs of all seeds ended, each way once."""
    counts = Counter(found["ended"] for found in figures.values())
    return ", ".join(how if count == 1 else f"{how} x {count}" for how, count in counts.items())
