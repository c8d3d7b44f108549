"""Several runs beside one another: the settings that differ, the figures, and answers to the same prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaroma.config.load import flattened
from qaroma.errors import QaromaError
from qaroma.report.run_table import RunRecord, list_runs, read_run, shown

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

    runs: tuple[RunRecord, ...]
    settings: dict[str, tuple[Any, ...]]
    figures: dict[str, tuple[Any, ...]]
    answers: tuple[AnswersToOne, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "runs": [run.to_json() for run in self.runs],
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
    runs = tuple(_read(Path(path)) for path in paths)
    return SideBySide(runs, _differing([run.settings for run in runs]), _figures(runs), tuple(_common_answers(runs)))


def _read(path: Path) -> RunRecord:
    if not path.is_dir():
        parent = path.parent if path.parent.is_dir() else Path("runs")
        known = [run.path.as_posix() for run in list_runs(parent)] if parent.is_dir() else []
        near = difflib.get_close_matches(path.as_posix(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"qaroma runs {parent.as_posix()} lists what is there"
        raise QaromaError(f"there is no run {path.as_posix()}; {hint}")
    run = read_run(path)
    if run.state == "broken":
        raise QaromaError(f"{path.as_posix()} cannot be compared: {run.problem}; expected a run directory")
    return run


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The dotted keys whose values are not the same in all, in the order of the first file that has them."""
    flat = [flattened(one) for one in settings]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: tuple(one.get(key) for one in flat) for key in keys if key not in _NOT_COMPARED}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _figures(runs: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """Every figure that at least one run has."""
    rows: dict[str, tuple[Any, ...]] = {"state": tuple(run.sentence() for run in runs)}
    rows["steps"] = tuple(run.steps for run in runs)
    rows["seconds"] = tuple(run.seconds for run in runs)
    rows["training_seconds"] = tuple(run.training_seconds for run in runs)
    for name in dict.fromkeys(one.name for run in runs for one in run.validation):
        found = [next((one for one in run.validation if one.name == name), None) for run in runs]
        for part in ("before", "best", "best_step", "last"):
            rows[f"validation_{name}_{part}"] = tuple(one and getattr(one, part) for one in found)
    for name in (
        "exact_match_before", "exact_match", "rank_min", "rank_mean", "rank_max",
        "trainable_start", "trainable_mean", "trainable_end",
    ):  # fmt: skip
        rows[name] = tuple(getattr(run, name) for run in runs)
    rows["bytes"] = tuple(run.bytes for run in runs)
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def _common_answers(runs: Sequence[RunRecord]) -> list[AnswersToOne]:
    """Answers to the prompts that all runs have answered; the prompts whose answers differ come first."""
    given = [_last_answers(run) for run in runs]
    expected: dict[str, str] = {}
    for run in runs:
        for record in run.answers:
            expected.update(zip(record["prompts"], record.get("expected", ()), strict=False))
    common = [prompt for prompt in given[0] if all(prompt in one for one in given)]
    found = [AnswersToOne(prompt, expected.get(prompt), tuple(one[prompt] for one in given)) for prompt in common]
    return sorted(found, key=lambda one: len(set(one.answers)) == 1)


def _last_answers(run: RunRecord) -> dict[str, str]:
    """Prompt -> the last answer that was logged after training had begun."""
    answers: dict[str, str] = {}
    for record in run.answers:
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
    if not compared.answers:
        console.print("\nno prompt was answered by all of them: --set evaluation.data=FILE makes a run answer some")
        return
    differ = sum(len(set(one.answers)) > 1 for one in compared.answers)
    console.print(f"\nanswers: {len(compared.answers)} prompts in common, {differ} answered differently")
    for one in compared.answers[:answers]:
        console.print()
        console.print(_answers(one, names))


def _names(runs: Sequence[RunRecord]) -> list[str]:
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
        return f"{100 * value:.1f} %"
    if key == "bytes":
        return f"{value / 1e6:,.1f} MB"
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
    table.add_row(Text("prompt"), Text(_shortened(one.prompt), style="bold"))
    if one.expected is not None:
        table.add_row(Text("expected"), Text(_shortened(one.expected)))
    for name, answer in zip(names, one.answers, strict=True):
        right = one.expected is not None and answer is not None and answer.strip() == one.expected.strip()
        table.add_row(Text(name), Text(_shortened(shown(answer)), style="green" if right else ""))
    return table


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + " ..."
