"""The information ladder: growth on more and more random pairs, beside the smallest LoRA that keeps them all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

from qaroma.compare.suite.beds import ENOUGH, Bed
from qaroma.compare.suite.cells import Cell, Figures
from qaroma.compare.suite.oracle import RANKS
from qaroma.compare.suite.view import Rows, View, average, endings, ours_cells

RATES = (1.0, 0.5)  # of the bed's rate; a rank suffices if it does at either
SEEDS = 3


class Known(Protocol):
    """Cells that are done."""

    def get(self, cell: Cell, /) -> Figures | None: ...


@dataclass(frozen=True)
class Smallest:
    """Where the search for the smallest sufficient rank of a rung stands.

    Attributes:
        wanted: cells that it needs next.
        cell: the smallest that suffices; None while that is open, or where no rank does.
    """

    wanted: list[Cell]
    cell: Cell | None


def smallest(bed: Bed, results: Known) -> Smallest:
    """Halve the ladder of ranks: what suffices at a rank suffices at every larger one.

    Args:
        bed: a rung.
        results: ``get`` gives a cell's figures, None while it is not done.
    """
    low, high, found = 0, len(RANKS), None
    while low < high:
        middle = (low + high) // 2
        enough = None
        for rate in RATES:
            cell = Cell(bed.name, f"lora:{RANKS[middle]}", 0, bed.rate * rate)
            figures = results.get(cell)
            if figures is None:
                return Smallest([cell], None)
            if figures["score"] is not None and figures["score"] >= ENOUGH:
                enough = cell
                break
        if enough is None:
            low = middle + 1
        else:
            high, found = middle, enough
    return Smallest([], found)


def plan(view: View) -> list[Cell]:
    """Growth on a few seeds of every rung, and the search for the smallest sufficient LoRA."""
    wanted = []
    for bed in view.of_kind("ladder"):
        wanted += [*_ours(view, bed).values(), *smallest(bed, view.results).wanted]
    return wanted


def rows(view: View) -> Rows:
    """One row for each rung that growth has climbed."""
    head = ["pairs", "exact match", "rank, mean", "parameters", "smallest LoRA", "parameters / its", "steps", "its",
            "ended"]  # fmt: skip
    text = [head]
    values: list[dict[str, Any]] = []
    for bed in view.of_kind("ladder"):
        ours = view.done(_ours(view, bed))
        ours = {seed: figures for seed, figures in ours.items() if figures["score"] is not None}
        if not ours:
            continue
        found = smallest(bed, view.results)
        lora = view.results.get(found.cell) if found.cell else None
        share = average(ours, "parameters") / lora["parameters"] if lora else None
        none = "not found yet" if found.wanted else f"none of r {RANKS[0]} to {RANKS[-1]}"
        text.append([
            bed.source, f"{average(ours, 'score_best'):.3f}", f"{average(ours, 'rank'):.2f}",
            f"{average(ours, 'parameters'):,.0f}", f"r {found.cell.arm.removeprefix('lora:')}" if found.cell else none,
            "-" if share is None else f"{share:.2f}", f"{average(ours, 'steps'):.0f}",
            str(lora["steps"]) if lora else "-", endings(ours),
        ])  # fmt: skip
        values.append({
            "pairs": int(bed.source), "exact_match": average(ours, "score_best"), "rank": average(ours, "rank"),
            "parameters": average(ours, "parameters"), "share": share,
            "smallest_rank": int(found.cell.arm.removeprefix("lora:")) if found.cell else None,
            "smallest_parameters": lora["parameters"] if lora else None,
            "loss": average({seed: _last(figures) for seed, figures in ours.items()}, "loss"),
        })  # fmt: skip
    monotone = all(a["rank"] <= b["rank"] for a, b in itertools.pairwise(values))
    said = [f"Mean rank {'rises' if monotone else 'does not rise'} with the number of pairs."] if values else []
    return text, said, values


def _last(figures: Figures) -> dict[str, Any]:
    seen = figures["validations"]
    return {"loss": seen[-1][1] if seen else None}


def _ours(view: View, bed: Bed) -> dict[int, Cell]:
    return dict(list(ours_cells(view, bed).items())[:SEEDS])
