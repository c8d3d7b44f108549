"""Several runs beside one another: the settings that differ, the figures, and answers to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaroma.config.load import flattened
from qaroma.config.metrics import METRICS
from qaroma.config.words import file_size, shortened, shown
from qaroma.errors import QaromaError
from qaroma.report.run_table import state_sentence
from qaroma.runs.figures import as_json, figures_of
from qaroma.runs.finding import open_run
from qaroma.runs.reading import Run

if TYPE_CHECKING:
    from rich.console import Console

# Where a run lies says nothing about what was run.
_NOT_COMPARED = ("output",)
_LONGEST_SHOWN = 300
_LARGE = 10_000.0


@dataclass(frozen=True)
class AnswersToOne:
    """What several runs answered to one prompt; None where a run was not asked."""

    prompt: str
    expected: str | None
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class SideBySide:
    """Several runs compared.

    Attributes:
        runs: in the order in which they were named.
        settings: dotted key -> value in each run, for the keys that differ.
        figures: name -> value in each run.
        answers: to the prompts that all of them have answered, those that differ first.
    """

    runs: tuple[Run, ...]
    settings: dict[str, tuple[Any, ...]]
    figures: dict[str, tuple[Any, ...]]
    answers: tuple[AnswersToOne, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "runs": [as_json(run) for run in self.runs],
            "settings": self.settings,
            "figures": self.figures,
            "answers": [vars(one) for one in self.answers],
        }


def compare_runs(paths: Sequence[str | Path]) -> SideBySide:
    """Read several runs and put them side by side.

    Args:
        paths: run directories, finished or not.

    Raises:
        QaromaError: fewer than two, or one that is no run or is broken; near names are given.
    """
    if len(paths) < 2:
        raise QaromaError(
            "got one run; expected two or more: qaroma compare-runs runs/A runs/B (qaroma runs lists them)"
        )
    runs = tuple(open_run(path) for path in paths)
    return SideBySide(runs, _differing([run.config for run in runs]), _figures(runs), tuple(_common_answers(runs)))


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The dotted keys whose values are not the same in all, in the order of the first file that has them."""
    flat = [flattened(one) for one in settings]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: tuple(one.get(key) for one in flat) for key in keys if key not in _NOT_COMPARED}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _figures(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    """Every figure that at least one run has."""
    rows: dict[str, tuple[Any, ...]] = {"state": tuple(state_sentence(run) for run in runs)}
    rows["steps"] = tuple(run.step for run in runs)
    all_figures = [figures_of(run) for run in runs]
    for name in ("seconds", "training_seconds"):
        rows[name] = tuple(getattr(figures, name) for figures in all_figures)
    for name in dict.fromkeys(one.name for figures in all_figures for one in figures.validation):
        found = [figures.of(name) for figures in all_figures]
        for part in ("before", "best", "best_step", "last"):
            rows[f"validation_{name}_{part}"] = tuple(one and getattr(one, part) for one in found)
    for name in (
        "exact_match_before", "exact_match", "rank_min", "rank_mean", "rank_max",
        "trainable_start", "trainable_mean", "trainable_end",
    ):  # fmt: skip
        rows[name] = tuple(getattr(figures, name) for figures in all_figures)
    rows["bytes"] = tuple(run.bytes for run in runs)
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def _common_answers(runs: Sequence[Run]) -> list[AnswersToOne]:
    """Answers to the prompts that all runs have answered; the prompts whose answers differ come first."""
    given = [_last_answers(run) for run in runs]
    expected: dict[str, str] = {}
    for run in runs:
        for record in (*run.answers, *run.samples):
            expected.update(zip(record["prompts"], record.get("expected", ()), strict=False))
    common = [prompt for prompt in given[0] if all(prompt in one for one in given)]
    found = [AnswersToOne(prompt, expected.get(prompt), tuple(one[prompt] for one in given)) for prompt in common]
    return sorted(found, key=lambda one: len(set(one.answers)) == 1)


def _last_answers(run: Run) -> dict[str, str]:
    """Prompt -> the last answer that was logged after training had begun."""
    answers: dict[str, str] = {}
    for record in sorted((*run.samples, *run.answers), key=lambda record: int(record.get("step", 0))):
        if record.get("when") != "before":
            answers.update(zip(record["prompts"], record["answers"], strict=False))
    return answers


def print_side_by_side(compared: SideBySide, console: Console, *, answers: int = 5) -> None:
    """Three tables: settings that differ, figures, answers.

    Args:
        compared: from :func:`compare_runs`.
        console: where they go.
        answers: at most so many prompts.
    """
    from rich.text import Text

    names = _names(compared.runs)
    if compared.settings:
        console.print(_table("settings that differ", names, compared.settings))
    else:
        console.print(Text("settings: the same", style="bold"))
    console.print()
    console.print(_table("figures", names, compared.figures))
    console.print("ranks are those of the best adapter", style="dim", highlight=False)
    if not compared.answers:
        console.print("\nno prompt was answered by all of them: --set evaluation.data=FILE makes a run answer some")
        return
    differ = sum(len(set(one.answers)) > 1 for one in compared.answers)
    console.print(f"\nanswers: {len(compared.answers)} prompts in common, {differ} answered differently")
    for one in compared.answers[:answers]:
        console.print()
        console.print(_answers(one, names))


def _names(runs: Sequence[Run]) -> list[str]:
    """The directories' own names, or their paths where two have the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.path.as_posix() for run in runs]


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column(Text(title, style="bold"), no_wrap=True)
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for key, values in rows.items():
        table.add_row(Text(key), *(Text(_value(key, value)) for value in values))
    return table


def _value(key: str, value: Any) -> str:
    if key.startswith("exact_match") and value is not None:
        return METRICS["exact_match"].text(value)
    if key == "bytes":
        return file_size(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= _LARGE else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_source(one) for one in value)
    return shown(value)


def _source(one: Any) -> str:
    """A data source as it is typed."""
    if not isinstance(one, Mapping) or "path" not in one:
        return str(one)
    weight = one.get("weight", 1)
    return str(one["path"]) + ("" if weight == 1 else f":{weight:g}")


def _answers(one: AnswersToOne, names: Sequence[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text("prompt"), Text(shortened(one.prompt, _LONGEST_SHOWN), style="bold"))
    if one.expected is not None:
        table.add_row(Text("expected"), Text(shortened(one.expected, _LONGEST_SHOWN)))
    for name, answer in zip(names, one.answers, strict=True):
        right = one.expected is not None and answer is not None and answer.strip() == one.expected.strip()
        table.add_row(Text(name), Text(shortened(shown(answer), _LONGEST_SHOWN), style="green" if right else ""))
    return table
