"""The ranks as a map layer x kind of module, in one hue: which shade each cell has, and what the map says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qaroma.report.names import layer_grid, locate, short_labels, without_shared_ending
from qaroma.runs.reading import Run

# Of rank 0, then from the lowest rank to the highest, each with the ink that is read on it (4.5 to 1 and more).
SHADES = ("#f6f8fa", "#e3eef8", "#c0d9ef", "#93bce0", "#3a7ab5", "#1f5f9e", "#0b3f78")
INKS = ("#56606b", "#12304a", "#12304a", "#12304a", "#ffffff", "#ffffff", "#ffffff")
_EVEN = 4  # shade of a map whose cells are all alike: neither lowest nor highest


@dataclass(frozen=True)
class Cell:
    """One module's value as it is written, or several experts' mean, and its place in ``SHADES``."""

    text: str
    shade: int


@dataclass(frozen=True)
class RankMap:
    """A map ready to draw.

    Attributes:
        finding: what it shows, as a sentence.
        kinds: labels of the kinds of modules.
        layers: label of each layer, and its cells; None where the layer lacks the kind.
    """

    finding: str
    kinds: Sequence[str]
    layers: Sequence[tuple[str, Sequence[Cell | None]]]


def map_of_ranks(run: Run) -> RankMap | None:
    """The ranks that a method found, of the best adapter; None where somebody chose one for all modules."""
    ranks = run.adapter_ranks() or run.last_ranks()
    return rank_map(ranks) if ranks and (run.grows or len(set(ranks.values())) > 1) else None


def rank_map(values: Mapping[str, float], name: str = "Rank", scale: float | None = None) -> RankMap:
    """Shade one value a module, by its full name in the model's order.

    Args:
        values: ranks, or effective ranks; one at least.
        name: what they are, for the finding.
        scale: value of the highest shade; None is the largest one.
    """
    grid = layer_grid(values)
    largest, even = scale or max(values.values()), len(set(values.values())) == 1
    rows = [[_cell(fmean(found), largest, even) if found else None for found in row] for row in grid.cells]
    layers = list(zip(grid.rows, rows, strict=True))
    return RankMap(_finding(values, name), without_shared_ending(grid.columns), layers)


def shade(value: float, largest: float, *, even: bool) -> int:
    """Place in ``SHADES``, by the share of the largest value; a middle one where all are alike."""
    if value <= 0:
        return 0
    return _EVEN if even else max(1, round((len(SHADES) - 1) * value / largest))


def _cell(value: float, largest: float, even: bool) -> Cell:
    return Cell(f"{value:.0f}" if value == round(value) else f"{value:.1f}", shade(value, largest, even=even))


def _finding(values: Mapping[str, float], name: str) -> str:
    low, high, count = min(values.values()), max(values.values()), len(values)
    if low == high:
        return f"{name} {high:.3g} in each of {count} modules."
    by_kind: dict[str, list[float]] = {}
    for module, value in values.items():
        by_kind.setdefault(locate(module)[2], []).append(value)
    means = dict(zip(short_labels(list(by_kind)), map(fmean, by_kind.values()), strict=True))
    spread = f"{name} {low:.3g} to {high:.3g}, {fmean(values.values()):.3g} on average"
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    if means[most] == means[least]:
        return f"{spread}."
    return f"{spread}; most in {most} ({means[most]:.3g}), least in {least} ({means[least]:.3g})."
