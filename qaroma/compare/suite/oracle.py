"""The oracle: the rank and rate of LoRA that is best on seeds of its own, found step by step.

Every function takes the scores that are known and returns what it still needs, so that a search goes
on where it stopped. Numbers in, decisions out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qaroma.compare.statistics import mean
from qaroma.compare.suite.beds import CHOOSING_SEEDS, Bed
from qaroma.compare.suite.cells import Cell

RANKS = (1, 2, 4, 8, 16, 32)
FIRST = 8  # the rank whose rates are searched first, and that is reported beside the oracle
STEP = 2.0  # between two neighbouring rates
WIDEST = 5  # rates away from the first one at most
FINALISTS = 3

Loss = Callable[[Cell], "float | None"]  # of a cell, lower is better; None while it is not done


@dataclass(frozen=True)
class Search:
    """Where a search stands.

    Attributes:
        wanted: cells that it needs next; none of them are done.
        best: the cell that won, with the first choosing seed; None until the search is over.
        best_of_rank: the best rate of each rank so far, as cells.
    """

    wanted: list[Cell]
    best: Cell | None
    best_of_rank: dict[int, Cell]


def search(bed: Bed, loss: Loss) -> Search:
    """Look for the best rank and rate of a bed.

    The rates of rank 8 are searched first, downhill in steps of two. The other ranks begin at its best
    rate; all of them, or on a dear bed the best three, have their own rates searched. The best three
    (rank, rate) pairs are run on a second seed, and the mean of both decides.
    """
    place, wanted = _downhill(bed, FIRST, 0, loss)
    if place is None:
        return Search(wanted, None, {})
    starts = [rank for rank in RANKS if rank != FIRST]
    wanted = [cell for rank in starts if loss(cell := _cell(bed, rank, place)) is None]
    if wanted:
        return Search(wanted, None, {FIRST: _cell(bed, FIRST, place)})
    beginning = {rank: _cell(bed, rank, place) for rank in RANKS}
    order = sorted(RANKS, key=lambda rank: _known(loss, beginning[rank]))
    searched = order[: 3 if bed.dear else len(RANKS)]
    best_of_rank, wanted = dict(beginning), []
    for rank in searched:
        found, more = _downhill(bed, rank, place, loss)
        wanted += more
        if found is not None:
            best_of_rank[rank] = _cell(bed, rank, found)
    if wanted:
        return Search(wanted, None, best_of_rank)
    finalists = sorted(best_of_rank.values(), key=lambda cell: _known(loss, cell))[:FINALISTS]
    seconds = {cell: Cell(bed.name, cell.arm, CHOOSING_SEEDS[1], cell.rate) for cell in finalists}
    wanted = [cell for cell in seconds.values() if loss(cell) is None]
    if wanted:
        return Search(wanted, None, best_of_rank)
    best = min(finalists, key=lambda cell: mean([_known(loss, cell), _known(loss, seconds[cell])]))
    return Search([], best, best_of_rank)


def fresh(bed: Bed, cell: Cell, seed: int) -> Cell:
    """The same rank and rate on a seed that chose nothing."""
    return Cell(bed.name, cell.arm, seed, cell.rate)


def _downhill(bed: Bed, rank: int, start: int, loss: Loss) -> tuple[int | None, list[Cell]]:
    """The place of the best rate of a rank, between two that are worse, or what is needed to find it."""
    place = start
    while True:
        around = [p for p in (place - 1, place, place + 1) if abs(p) <= WIDEST]
        wanted = [cell for p in around if loss(cell := _cell(bed, rank, p)) is None]
        if wanted:
            return None, wanted
        best = min(around, key=lambda p: (_known(loss, _cell(bed, rank, p)), abs(p - place)))
        if best == place:
            return place, []
        place = best


def _cell(bed: Bed, rank: int, place: int) -> Cell:
    return Cell(bed.name, f"lora:{rank}", CHOOSING_SEEDS[0], float(f"{bed.rate * STEP**place:.4g}"))


def _known(loss: Loss, cell: Cell) -> float:
    found = loss(cell)
    assert found is not None
    return found
