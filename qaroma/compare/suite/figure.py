"""The pictures of the suite: the ladder, and the ranks of adapters beside the planted ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_ladder(rungs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Loss, rank and parameters against the number of pairs.

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


def draw_planted(seeds: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The rank of each layer's adapter against the rank that was planted in it; area is the number of layers.

    Args:
        seeds: the values of the planted table.
        file: its suffix says the format.
    """
    from matplotlib.figure import Figure

    counts = Counter(pair for seed in seeds for pair in zip(seed["planted"], seed["given"], strict=True))
    planted, given = zip(*counts, strict=True)
    largest = max(*planted, *given)
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, largest], [0, largest], color="0.7", zorder=0, label="what was planted")
    axes.scatter(planted, given, s=[12 * count for count in counts.values()], label="layers (area: how many)")
    axes.set_aspect("equal")
    axes.set_xlabel("planted rank of a layer's update")
    axes.set_ylabel("rank that the adapter ends with")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
