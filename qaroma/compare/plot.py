"""The figure of a comparison: the metric and the trainable parameters of every method against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qaroma.compare.statistics import mean
from qaroma.report.drawings import panels_figure
from qaroma.report.panels import Line, Panel
from qaroma.report.style import DASHES, PALETTE, save
from qaroma.runs.figures import figures_of
from qaroma.runs.reading import Run, Series


def draw(logs: Mapping[str, Sequence[Run]], metric: str, folder: Path) -> list[Path]:
    """Write ``plot.png`` and ``plot.svg``: a line for each method's mean over seeds, a pale one for each run.

    Args:
        logs: label -> finished runs.
        metric: of the first panel.
        folder: where the files go.
    """
    last = max((run.step for runs in logs.values() for run in runs), default=0)
    panels = [Panel("trainable", "Trainable parameters of the adapter", _lines(logs, None, last), last, from_zero=True)]
    curves = _lines(logs, metric, last)
    if curves:
        panels.insert(0, Panel("metric", f"Validation {metric}", curves, last))
    figure = panels_figure(panels)
    files = [folder / "plot.png", folder / "plot.svg"]
    for file in files:
        save(figure, file)
    return files


def _lines(logs: Mapping[str, Sequence[Run]], metric: str | None, last: int) -> list[Line]:
    pale, strong = [], []
    for place, (label, runs) in enumerate(logs.items()):
        found = [run.validation(metric) if metric else _trainable(run) for run in runs]
        found = [series for series in found if len(series)]
        if not found:
            continue
        colour, style = place % len(PALETTE), place // len(PALETTE) % len(DASHES)
        if len(found) > 1:
            pale += [Line("", series, colour, pale=True) for series in found]
        course = _mean_series([series.until(last) for series in found])
        strong.append(Line(label, course, colour, style, marked=metric is not None))
    return [*pale, *strong]


def _trainable(run: Run) -> Series:
    """From the start, which the steps do not log."""
    series = run.series("trainable_parameters")
    start = figures_of(run).trainable_start
    return series if start is None else Series([0, *series.steps], [start, *series.values])


def _mean_series(found: Sequence[Series]) -> Series:
    """The mean at the steps that all have; a run that ended keeps its last value."""
    values = [dict(series.points) for series in found]
    common = sorted(set.intersection(*(set(points) for points in values)))
    return Series(common, [mean([points[step] for points in values]) for step in common])
