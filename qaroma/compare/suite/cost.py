"""What growth costs: its steps beside those of LoRA of the rank that it has, taken in turns on one core."""

from __future__ import annotations

import time
from dataclasses import replace

from qaroma.compare.suite.beds import Bed, Place
from qaroma.compare.suite.cells import Cell, Figures
from qaroma.compare.suite.trial import Course, Trial, prepare, train_step

BLOCKS, BLOCK = 12, 10  # turns, and steps in each
GROWN = 0.6  # share of the run after which growth is looked at


def measure(cell: Cell, bed: Bed, place: Place) -> Figures:
    """CPU seconds of a step of growth over those of LoRA, turn by turn.

    Growth trains until it has most of its rank; then both take turns of a few steps.

    Returns:
        ``ratios`` of each turn, the rank that LoRA was given, and the milliseconds of a step of both.
    """
    grown = prepare(cell, bed, place)
    course = Course()
    until = max(1, round(GROWN * bed.steps))
    while course.steps < until and not grown.method.finished:
        train_step(grown, course)
    ranks = list(grown.method.ranks().values())
    rank = max(1, round(sum(ranks) / len(ranks)))
    lora = prepare(replace(cell, arm=f"lora:{rank}", rate=bed.rate, factor=1.0), bed, place)
    fixed = Course()
    _block(lora, fixed)  # the first steps allocate
    ours: list[float] = []
    theirs: list[float] = []
    while len(ours) < BLOCKS and not grown.method.finished and course.steps + BLOCK <= bed.steps:
        ours.append(_block(grown, course))
        theirs.append(_block(lora, fixed))
    return {
        "ratios": [mine / other for mine, other in zip(ours, theirs, strict=True)],
        "rank": rank,
        "milliseconds": [1e3 * sum(part) / max(len(part), 1) / BLOCK for part in (ours, theirs)],
    }


def _block(trial: Trial, course: Course) -> float:
    start = time.process_time()
    for _ in range(BLOCK):
        if not trial.method.finished:
            train_step(trial, course)
    return time.process_time() - start
