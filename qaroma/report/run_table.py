"""What lies in run directories, as figures: state, scores, ranks, size. Nothing here loads a model.

A run is read as it is found: one of an older version, one that was killed, one that is being written,
or a directory with half of its files gone, which is listed as broken rather than passed over.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qaroma.errors import QaromaError
from qaroma.report.reading import LOWER_IS_BETTER
from qaroma.runs.directory import GROWTH, RunDirectory
from qaroma.runs.files import read_json
from qaroma.runs.log import read_records

if TYPE_CHECKING:
    from rich.console import Console

# A run that wrote a line so recently is taken to be at work: nothing else tells it from a killed one.
FRESH_SECONDS = 120.0
_CHECKPOINT = re.compile(r"step-(\d+)")
# Figures of a validation of which larger is better.
METRICS = ("accuracy", "matthews", "f1", "pearson", "spearman")
_PIPED = 1000
_NARROW = 130  # columns of a terminal; below, the table keeps what tells runs apart


@dataclass(frozen=True)
class Validation:
    """One figure of a run's validations: before training, the best after it, and the last."""

    name: str
    before: float | None
    best: float
    best_step: int
    last: float


@dataclass(frozen=True)
class RunRecord:
    """One run directory as it was found.

    Attributes:
        name: relative to the folder that was listed.
        path: the directory.
        state: finished, running (written to less than :data:`FRESH_SECONDS` ago), stopped or broken.
        problem: what is wrong with a broken one.
        model, data, method, task: as its configuration says.
        steps, total: optimiser steps done, and the step budget.
        checkpoint: step of the newest checkpoint.
        ended: why a finished run ended: grown, budget or patience.
        seconds: of the whole command that finished it.
        training_seconds: of its steps together.
        metric: the figure by which its best adapter is chosen.
        validation: that figure first, then the others.
        exact_match, exact_match_before: share of held-out requests answered exactly.
        rank_min, rank_mean, rank_max: over the modules of the adapter.
        trainable_start, trainable_mean, trainable_end: trainable parameters over the steps.
        bytes: of all its files.
        written: last change, seconds since 1970.
        settings: its configuration as plain values.
        answers: its events with answers to held-out requests and sample generations.
    """

    name: str
    path: Path
    state: str
    problem: str | None = None
    model: str | None = None
    data: str | None = None
    method: str | None = None
    task: str | None = None
    steps: int = 0
    total: int | None = None
    checkpoint: int | None = None
    ended: str | None = None
    seconds: float | None = None
    training_seconds: float | None = None
    metric: str = "loss"
    validation: tuple[Validation, ...] = ()
    exact_match_before: float | None = None
    exact_match: float | None = None
    rank_min: int | None = None
    rank_mean: float | None = None
    rank_max: int | None = None
    trainable_start: int | None = None
    trainable_mean: float | None = None
    trainable_end: int | None = None
    bytes: int = 0
    written: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    answers: tuple[Mapping[str, Any], ...] = ()

    @property
    def resume(self) -> str | None:
        """The command that goes on with a stopped run."""
        return RunDirectory(self.path).resume_command if self.state == "stopped" else None

    def sentence(self) -> str:
        """The state in words."""
        if self.state == "broken":
            return f"broken: {self.problem}"
        if self.state == "finished":
            return "finished" + (f" ({self.ended})" if self.ended else "")
        where = f"{self.state} at step {self.steps}" + (f" of {self.total}" if self.total else "")
        if self.state == "running":
            return where
        return f"{where}, resumable from {self.checkpoint or 0}"

    def to_json(self) -> dict[str, Any]:
        """All but the configuration and the answers, as plain JSON values."""
        values = {name: value for name, value in vars(self).items() if name not in ("settings", "answers")}
        return {
            **values,
            "path": self.path.as_posix(),
            "validation": [asdict(one) for one in self.validation],
            "written": datetime.fromtimestamp(self.written).astimezone().isoformat(timespec="seconds"),
            "resume": self.resume,
        }


def list_runs(folder: str | Path) -> list[RunRecord]:
    """The runs in a folder, newest first; also those one folder below, and the folder if it is a run.

    Args:
        folder: usually ``runs``.

    Raises:
        QaromaError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise QaromaError(
            f"there is no folder {root.as_posix()}; expected one that holds runs. "
            "Name it: qaroma runs FOLDER, or begin a run: qaroma finetune --config quickstart"
        )
    if _looks_like_run(root):
        return [read_run(root)]
    found = [read_run(path, path.relative_to(root).as_posix()) for path in _run_paths(root)]
    return sorted(found, key=lambda run: (-run.written, run.name))


def _run_paths(root: Path) -> Iterator[Path]:
    for path in sorted(p for p in root.iterdir() if p.is_dir()):
        if _looks_like_run(path):
            yield path
        else:
            yield from sorted(p for p in path.iterdir() if p.is_dir() and _looks_like_run(p))


def _looks_like_run(path: Path) -> bool:
    run = RunDirectory(path)
    return run.exists() or run.metrics.is_file() or run.checkpoints.is_dir()


def read_run(path: str | Path, name: str | None = None) -> RunRecord:
    """One run directory, whatever state it is in.

    Args:
        path: the directory.
        name: as it is shown; None is the directory's own.

    Returns:
        The record; ``state`` is broken where the configuration or the log cannot be read.
    """
    run = RunDirectory(path)
    size, written = _extent(run)
    known: dict[str, Any] = {"name": name or run.path.resolve().name, "path": run.path, "bytes": size}
    known["written"] = written
    try:
        settings = _settings(run)
        known.update(_from_settings(settings), settings=settings)
        records = read_records(run)
        known["metric"] = _metric(run, settings)
        return RunRecord(**known, **_from_log(run, records, known["metric"]), **_state(run, records, written))
    except QaromaError as broken:
        return RunRecord(**known, state="broken", problem=str(broken))


def _extent(run: RunDirectory) -> tuple[int, float]:
    """Bytes of all files, and the time of the last change of what a run writes."""
    sizes = []
    for file in run.path.rglob("*"):
        try:
            sizes.append(file.lstat().st_size if file.is_file() else 0)
        except OSError:  # a checkpoint that a running run removes meanwhile
            continue
    files = [file for file in (run.metrics, run.config, run.summary, run.path) if file.exists()]
    own = [file for file in files if file.is_file()] or files
    return sum(sizes), max((file.stat().st_mtime for file in own), default=0.0)


def _settings(run: RunDirectory) -> dict[str, Any]:
    if not run.exists():
        raise QaromaError("it has no config.yaml")
    try:
        settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise QaromaError("config.yaml cannot be read") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise QaromaError("config.yaml is no configuration of a run")
    return settings


def _from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    data, training = settings.get("data") or {}, settings.get("training") or {}
    sources = [str(one.get("path")) for one in data.get("train") or [] if isinstance(one, dict)]
    return {
        "model": settings["model"].get("name"),
        "data": ", ".join(sources) or None,
        "method": settings.get("method"),
        "task": settings.get("task", "causal-lm"),
        "total": training.get("max_steps"),
    }


def _metric(run: RunDirectory, settings: Mapping[str, Any]) -> str:
    """The figure by which the run chooses its best adapter; before an adapter says it, as was asked for."""
    written = read_json(run.summary).get("metric") or read_json(run.adapter / GROWTH).get("metric")
    return str(written or (settings.get("evaluation") or {}).get("metric") or "loss")


def _from_log(run: RunDirectory, records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    steps = [record for record in records if "event" not in record and "trainable_parameters" in record]
    answers = [record for record in records if record.get("event") == "answers"]
    after = [record for record in answers if record.get("when") == "after"]
    before = [record for record in answers if record.get("when") == "before"]
    trainable = [record["trainable_parameters"] for record in steps]
    timed = bool(steps) and all("seconds" in record for record in steps)  # older runs did not note it
    return {
        "validation": tuple(_validations([r for r in records if r.get("event") == "validation"], metric)),
        "training_seconds": sum(record["seconds"] for record in steps) if timed else None,
        "exact_match_before": before[-1].get("exact_match") if before else None,
        "exact_match": after[-1].get("exact_match") if after else None,
        "trainable_start": trainable[0] if trainable else None,
        "trainable_mean": sum(trainable) / len(trainable) if trainable else None,
        "trainable_end": trainable[-1] if trainable else None,
        "answers": tuple(record for record in records if record.get("event") in ("answers", "samples")),
        **_ranks(run, records, steps),
    }


def _validations(records: Sequence[Mapping[str, Any]], metric: str) -> Iterator[Validation]:
    """Every figure, ``metric`` first; the untrained model's figures count as 'before' alone."""
    for name in dict.fromkeys((metric, "loss", *METRICS)):
        found = ((record["step"], record.get(name)) for record in records)
        points = [(step, value) for step, value in found if isinstance(value, (int, float)) and math.isfinite(value)]
        after = [point for point in points if point[0] > 0] or points
        if after:
            better = min if name in LOWER_IS_BETTER else max
            best_step, best = better(after, key=lambda point: point[1])
            before = points[0][1] if points[0][0] == 0 else None
            yield Validation(name, before, best, best_step, after[-1][1])


def _ranks(
    run: RunDirectory, records: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Ranks of the adapter that the run left; before there is one, as last logged."""
    growth = read_json(run.adapter / GROWTH)
    logged = [record["ranks"] for record in records if record.get("event") == "ranks"]
    values: list[int] = []
    if isinstance(growth.get("components"), dict):
        values = [sum(components) for components in growth["components"].values()]
    elif logged:
        values = list(logged[-1].values())
    if values:
        return {"rank_min": min(values), "rank_mean": sum(values) / len(values), "rank_max": max(values)}
    return {"rank_mean": steps[-1].get("mean_rank")} if steps else {}


def _state(run: RunDirectory, records: Sequence[Mapping[str, Any]], written: float) -> dict[str, Any]:
    """How far the run came. One that was finished and then resumed is not finished any more."""
    steps = [record for record in records if "event" not in record and "step" in record]
    last = steps[-1]["step"] if steps else 0
    summary = read_json(run.summary)
    found = (_CHECKPOINT.fullmatch(path.name) for path in run.checkpoints.glob("step-*"))
    checkpoint = max((int(match[1]) for match in found if match), default=None)
    finished = run.finished(last)
    fresh = time.time() - written < FRESH_SECONDS
    return {
        "state": "finished" if finished else "running" if fresh else "stopped",
        "steps": last,
        "checkpoint": checkpoint,
        "ended": summary.get("ended") if finished else None,
        "seconds": summary.get("seconds") if finished else None,
    }


def print_runs(runs: Sequence[RunRecord], folder: str | Path, console: Console) -> None:
    """The table of runs, and how to go on with stopped ones.

    Args:
        runs: from :func:`list_runs`.
        folder: where they lie, for the sentence about an empty one.
        console: its width decides how many columns are shown.
    """
    from rich.table import Table
    from rich.text import Text

    if not runs:
        console.print(f"no runs in {Path(folder).as_posix()}; begin one: qaroma finetune --config quickstart")
        return
    wide = console.width >= _NARROW
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    heads = ["run", *(["model", "data", "method"] if wide else []), "state", "steps", "validation"]
    for head in [*heads, "exact", "rank", *(["size", "written"] if wide else [])]:
        right = head in ("steps", "exact", "rank", "size")
        table.add_column(head, overflow="fold", justify="right" if right else "left")
    for run in runs:
        cells = [run.name]
        cells += [shown(run.model and Path(run.model).name), shown(run.data), shown(run.method)] if wide else []
        cells += [run.sentence(), str(run.steps) if run.state != "broken" else "-", _best(run)]
        cells += ["-" if run.exact_match is None else f"{100 * run.exact_match:.1f} %"]
        cells += ["-" if run.rank_mean is None else f"{run.rank_mean:.2f}"]
        cells += [f"{run.bytes / 1e6:,.1f} MB", f"{datetime.fromtimestamp(run.written):%Y-%m-%d %H:%M}"] if wide else []
        table.add_row(*(Text(cell) for cell in cells), style="red" if run.state == "broken" else "")
    console.print(table)
    for run in runs:
        if run.resume:
            console.print(f"go on with {run.name}: {run.resume}", soft_wrap=True, markup=False, highlight=False)


def table_console() -> Console:
    """Where tables go: stdout, as wide as the terminal, and with no cut column where it is piped."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_PIPED)


def shown(value: object) -> str:
    """A value as a cell of a table; ``-`` where there is none."""
    return "-" if value is None else str(value)


def _best(run: RunRecord) -> str:
    if not run.validation:
        return "-"
    figure = run.validation[0]
    if figure.best_step == 0:
        return f"{figure.name} {figure.best:.4g} before training"
    return f"{figure.name} {figure.best:.4g} at {figure.best_step}"
