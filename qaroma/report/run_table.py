"""``qaroma runs``: the runs of a folder as a table, and how to go on with stopped ones."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qaroma.config.metrics import METRICS, metric_facts
from qaroma.config.words import file_size, shown
from qaroma.runs.figures import Figures, figures_of
from qaroma.runs.reading import Run

if TYPE_CHECKING:
    from rich.console import Console

_PIPED = 1000
_NARROW = 130  # columns of a terminal; below, and in a pipe, the table keeps what tells runs apart


def print_runs(runs: Sequence[Run], folder: str | Path, console: Console) -> None:
    """The table of runs, and how to go on with stopped ones.

    Args:
        runs: from :func:`qaroma.runs.finding.list_runs`.
        folder: where they lie, for the sentence about an empty one.
        console: its width decides how many columns are shown.
    """
    from rich.table import Table
    from rich.text import Text

    if not runs:
        console.print(f"no runs in {Path(folder).as_posix()}; begin one: qaroma demo")
        return
    wide = console.is_terminal and console.width >= _NARROW
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    heads = ["run", *(["model", "data", "method"] if wide else []), "state", "step", "validation"]
    for head in [*heads, "exact", "rank", *(["size", "written"] if wide else [])]:
        right = head in ("step", "exact", "rank", "size")
        table.add_column(head, overflow="fold", justify="right" if right else "left")
    for run in runs:
        table.add_row(*(Text(cell) for cell in _cells(run, wide)), style="red" if run.state == "broken" else "")
    console.print(table)
    console.print("validation and rank are those of the best adapter", style="dim", highlight=False)
    for run in runs:
        if run.resume:
            console.print(f"go on with {run.name}: {run.resume}", soft_wrap=True, markup=False, highlight=False)


def table_console() -> Console:
    """Where tables go: stdout, as wide as the terminal, and with no cut cell where it is piped."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_PIPED)


def state_sentence(run: Run) -> str:
    """The state of a run in words."""
    if run.state == "broken":
        return f"broken: {run.problem}"
    if run.finished:
        return "finished" + (f" ({run.ended})" if run.ended else "")
    where = f"{run.state} at step {run.step}" + (f" of {run.budget}" if run.budget else "")
    return where if run.state == "running" else f"{where}, resumable from {run.checkpoint or 0}"


def _cells(run: Run, wide: bool) -> list[str]:
    figures = figures_of(run)
    exact = figures.exact_match
    model, data = run.setting("model.name"), ", ".join(run.sources())
    return [
        run.name,
        *([shown(model and Path(model).name), data or "-", shown(run.setting("method"))] if wide else []),
        state_sentence(run) if run.state == "broken" or run.finished else run.state,
        "-" if run.state == "broken" else f"{run.step} of {run.budget}" if run.budget else str(run.step),
        _best(figures),
        "-" if exact is None else METRICS["exact_match"].text(exact),
        "-" if figures.rank_mean is None else f"{figures.rank_mean:.2f}",
        *([file_size(run.bytes), f"{datetime.fromtimestamp(run.written):%Y-%m-%d %H:%M}"] if wide else []),
    ]


def _best(figures: Figures) -> str:
    if not figures.validation:
        return "-"
    first = figures.validation[0]
    when = f"at {first.best_step}" if first.best_step else "before training"
    return f"{first.name} {metric_facts(first.name).text(first.best)} {when}"
