"""The picture of the ladder: loss, rank and parameters against the number of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(rungs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the figure.

    Args:
        rungs: the values of the ladder's table.
        file: its suffix says the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    pairs = [rung["pairs"] for rung in rungs]
    panels = (("loss", None, "Loss at the end"), ("rank", "smallest_rank", "Mean rank of a module"),
              ("parameters", "smallest_parameters", "Parameters of the adapter"))  # fmt: skip
    for place, (ours, theirs, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 3, place)
        axes.plot(pairs, [rung[ours] for rung in rungs], "o-", label="growth")
        known = [(rung["pairs"], rung[theirs]) for rung in rungs if theirs and rung[theirs] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "s--", label="smallest LoRA that suffices")
            axes.legend(frameon=False)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(pairs, [f"{count:,}" for count in pairs])
        axes.set_title(title)
        axes.set_xlabel("random pairs to memorise")
    figure.savefig(file, dpi=150)
