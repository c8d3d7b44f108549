"""What a run prints when it is over: scores, examples, the rank map, and what to type next.

Everything takes plain values and returns or prints rich renderables; rich is imported on use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qaroma.config.metrics import metric_facts
from qaroma.config.words import duration, shortened
from qaroma.report.names import layer_grid, without_shared_ending
from qaroma.report.outcome import Outcome
from qaroma.runs.directory import quoted
from qaroma.runs.figures import Figures

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

# Background colours from no rank to the largest; the number stays readable on each of them.
_SHADES = ("#1f2937", "#1e3a5f", "#1d5b79", "#1f7a7a", "#2f8f5b", "#6b9a2f", "#b08a1e", "#c2541b")
_LONGEST_SHOWN = 400


@dataclass(frozen=True)
class Score:
    """One figure before and after training.

    Args:
        name: as printed, for instance ``exact match``.
        before: value of the base; None where it was not measured.
        after: value of the fine-tuned model; None where it was not measured.
        metric: its name in :mod:`qaroma.config.metrics`, which says how it is printed.
    """

    name: str
    before: float | None
    after: float | None
    metric: str = "loss"


@dataclass(frozen=True)
class BeforeAfter:
    """One prompt with the expected answer and the answers before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class RunSummary:
    """All that the end of a run prints.

    Args:
        run: run directory.
        adapter: folder of the adapter.
        steps: optimiser steps done.
        ended: why the run ended, and whether that is a success.
        ranks: rank of each target module of the best adapter, by its full name, zeros included.
        figures: of the finished run.
        scores: figures before and after.
        examples: answers before and after.
        evaluation_data: what the scores were measured on, as ``--data`` takes it.
        outputs: of a classifier or regression; None where the model writes text.
        in_gguf: whether the model can be exported as GGUF.
    """

    run: str
    adapter: str
    steps: int
    ended: Outcome
    ranks: Mapping[str, int]
    figures: Figures
    scores: Sequence[Score] = field(default_factory=tuple)
    examples: Sequence[BeforeAfter] = field(default_factory=tuple)
    evaluation_data: str | None = None
    outputs: int | None = None
    in_gguf: bool = True


def print_summary(run: RunSummary, console: Console | None = None) -> None:
    """Prints the end of a run.

    Args:
        run: what to print.
        console: where; None is stdout.
    """
    from rich.console import Console

    console = console or Console()
    for example in run.examples:
        console.print(_example(example))
    if run.ranks:
        console.print(rank_map(run.ranks, console.width))
    console.print(_figures(run))
    console.print("\nNext", style="bold")
    for line in next_commands(run):
        # Soft wrapping keeps a command whole when the output is narrow or piped.
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def next_commands(run: RunSummary) -> list[str]:
    """The commands to type after a run, each with what it is for."""
    where = quoted(Path(run.run).as_posix())
    data = quoted(run.evaluation_data) if run.evaluation_data else "FILE"
    export = f"qaroma export {where} --format gguf     # for Ollama, LM Studio, llama.cpp"
    if not run.in_gguf:
        export = f"qaroma export {where} --format merged   # for vLLM, SGLang, transformers"
    longer = [run.ended.command] if run.ended.command else []
    commands = [f"qaroma chat {where}", export] if run.outputs is None else []
    return [
        *longer,
        *commands,
        f"qaroma evaluate {where} --data {data}",
        f"qaroma report {where}   # figures and one page",
    ]


def rank_map(ranks: Mapping[str, int], width: int | None = None) -> RenderableType:
    """The ranks as a table layer x module, shaded in a terminal and readable when piped.

    The first whole number in a module's name is its layer. Names that differ only in a later
    number (experts) share a cell, which then shows the smallest and the largest rank.

    Args:
        ranks: rank of each module by its full name, in the model's order.
        width: columns that there are; where names do not fit, what they all end with is left out. None is any.

    Returns:
        A table with one row a layer, one column a kind of module, and the means of both.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = layer_grid(ranks)
    largest = max(ranks.values(), default=0)
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("layer", justify="right")
    for label in _fitting(grid.columns, width):
        table.add_column(label, justify="right", overflow="fold")
    table.add_column("mean", justify="right", style="bold")
    for label, row in zip(grid.rows, grid.cells, strict=True):
        shown = [_cell(values, largest) if values else Text("") for values in row]
        table.add_row(label, *shown, _mean([rank for values in row for rank in values]))
    table.add_section()
    means = (_mean([rank for row in grid.cells for rank in row[column]]) for column in range(len(grid.columns)))
    table.add_row("mean", *means, _mean(list(ranks.values())), style="bold")
    return Group(Text("Rank by layer and module", style="bold"), table)


def _fitting(names: Sequence[str], width: int | None) -> list[str]:
    """The names, without the ending that they share where they have no room with it."""
    room = sum(max(len(name), 4) + 2 for name in ("layer", *names, "mean"))
    return list(names) if width is None or room <= width else without_shared_ending(names)


def _cell(ranks: Sequence[float], largest: int) -> Text:
    from rich.text import Text

    low, high = min(ranks), max(ranks)
    shade = _SHADES[round(high / largest * (len(_SHADES) - 1)) if largest else 0]
    return Text(f" {low:g} " if low == high else f" {low:g}-{high:g} ", style=f"white on {shade}")


def _mean(ranks: Sequence[float]) -> str:
    return f"{sum(ranks) / len(ranks):.1f}" if ranks else ""


def _example(example: BeforeAfter) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    right = example.after.strip() == example.expected.strip()
    table.add_row("prompt", Text(shortened(example.prompt, _LONGEST_SHOWN), style="bold"))
    table.add_row("before", Text(shortened(example.before, _LONGEST_SHOWN)))
    table.add_row("after", Text(shortened(example.after, _LONGEST_SHOWN), style="green" if right else "yellow"))
    if not right:
        table.add_row("expected", Text(shortened(example.expected, _LONGEST_SHOWN)))
    table.add_row("", "")
    return table


def _figures(run: RunSummary) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", "")
    for score in run.scores:
        table.add_row(score.name, Text(_score(score), style="bold"))
    figures = run.figures
    if figures.rank_min is not None:
        spread = f"smallest {figures.rank_min}, mean {figures.rank_mean:.1f}, largest {figures.rank_max}"
        table.add_row("rank", f"{spread}, of the best adapter")
    if figures.trainable_start is not None:
        table.add_row("trainable parameters", _parameters(figures))
    table.add_row("run", Text(f"{run.steps} steps, {duration(figures.seconds or 0.0)}"))
    table.add_row("ended", Text(run.ended.text, style="green" if run.ended.success else "yellow"))
    table.add_row("adapter", Text(Path(run.adapter).as_posix()))
    return table


def _parameters(figures: Figures) -> str:
    """How many were trained, and how many the adapter holds: frozen ones too, and none that trimming left out."""
    start, mean, end = figures.trainable_start, figures.trainable_mean or 0, figures.trainable_end or 0
    changed = f"{start:,} at the start, {mean:,.0f} on average, {end:,} at the end"
    trained = f"{start:,} throughout" if start == mean == end else changed
    held = figures.adapter_parameters
    return trained if held is None else f"{trained}; {held:,} in the adapter"


def _score(score: Score) -> str:
    def shown(value: float | None) -> str:
        return "not measured" if value is None else metric_facts(score.metric).text(value)

    return f"{shown(score.before)} before, {shown(score.after)} after"
