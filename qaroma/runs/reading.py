"""A run as its directory tells it: settings, series against the step, ranks, samples.

Reads finished and unfinished runs of every method and task, and runs of older versions; what a run
lacks is empty here, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from qaroma.errors import QaromaError
from qaroma.runs.directory import GROWTH, RunDirectory
from qaroma.runs.files import read_json
from qaroma.runs.log import read_records

LOWER_IS_BETTER = ("loss", "perplexity")
# The metric that a task is judged by where the run names none; any task has a loss.
_MAIN_METRICS = ("accuracy", "pearson", "loss")
_NO_METRICS = ("event", "step", "tokens", "examples")
METHODS = {"aroma": "AROMA", "relora": "ReLoRA", "lora": "LoRA", "peft-lora": "LoRA (PEFT)", "adalora": "AdaLoRA"}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """Values against the optimiser step."""

    steps: Sequence[int] = ()
    values: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def until(self, step: int) -> Series:
        """The same series with its last value held up to ``step``."""
        if not self.steps or self.steps[-1] >= step:
            return self
        return Series([*self.steps, step], [*self.values, self.values[-1]])


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Args:
        path: The directory.
        name: What the run is called in figures.
        config: ``config.yaml``; empty where it is missing.
        summary: ``summary.json``; empty while the run goes on, and in older runs.
        metric: The validation metric that chose the best adapter; None where the run does not say.
        finished: Whether the run ended.
        steps: Lines of optimiser steps.
        validations: Lines of validations.
        growth: Lines of growth events.
        ranks: Step, and the rank of each module from that step on.
        samples: Answers generated while training.
        answers: The generation test before and after training.
    """

    path: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    finished: bool = False
    steps: Sequence[Record] = ()
    validations: Sequence[Record] = ()
    growth: Sequence[Record] = ()
    ranks: Sequence[tuple[int, Mapping[str, int]]] = ()
    samples: Sequence[Record] = ()
    answers: Sequence[Record] = ()

    @property
    def method(self) -> str:
        return str(self.config.get("method", "aroma"))

    @property
    def method_name(self) -> str:
        return METHODS.get(self.method, self.method)

    @property
    def task(self) -> str:
        return str(self.config.get("task", "causal-lm"))

    @property
    def step(self) -> int:
        """The last optimiser step that was logged."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def budget(self) -> int | None:
        """The step budget T, where the configuration names it."""
        found = self.setting("training.max_steps")
        return found if isinstance(found, int) else None

    def setting(self, key: str) -> Any:
        """One value of the configuration by its dotted key; None where it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def series(self, key: str) -> Series:
        """One figure of the optimiser steps, finite values only."""
        return _series(self.steps, key)

    def validation(self, metric: str) -> Series:
        """One metric of the validations, finite values only."""
        return _series(self.validations, metric)

    def metrics(self) -> list[str]:
        """Names of all that validations measured, in the order of the log."""
        return list(dict.fromkeys(key for line in self.validations for key in line if key not in _NO_METRICS))

    def main_metric(self) -> str:
        """The metric that the run's task is judged by."""
        measured = self.metrics()
        return next((name for name in (self.metric, *_MAIN_METRICS) if name is not None and name in measured), "loss")

    def modules(self) -> list[str]:
        """Full names of the target modules, in the model's order."""
        return list(self.ranks[-1][1]) if self.ranks else []

    def last_ranks(self) -> Mapping[str, int]:
        """Rank of each module at the last step."""
        return self.ranks[-1][1] if self.ranks else {}

    def total_rank(self) -> Series:
        """The sum of all modules' ranks from each step at which it changed."""
        return Series([step for step, _ in self.ranks], [sum(ranks.values()) for _, ranks in self.ranks])

    def module_rank(self, module: str) -> Series:
        """One module's rank from each step at which any rank changed."""
        found = [(step, ranks[module]) for step, ranks in self.ranks if module in ranks]
        return Series([step for step, _ in found], [rank for _, rank in found])


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run directory.

    Args:
        path: ``runs/NAME``.
        name: What to call it; None is the directory's name.

    Raises:
        QaromaError: no run there, or a configuration or a log that cannot be read.
    """
    run = RunDirectory(path)
    if not run.metrics.is_file() and not run.exists():
        what = "is not there" if not run.path.exists() else f"is no run (no {run.config.name}, no {run.metrics.name})"
        raise QaromaError(f"{path} {what}; give a run directory such as runs/NAME (qaroma runs lists them)")
    try:
        lines = read_records(run)
    except QaromaError as error:
        raise QaromaError(f"{path} is damaged: {error}; give another run (qaroma runs lists them)") from error
    config = _read_config(run.config)
    steps = [line for line in lines if "event" not in line and "step" in line]
    growth = _events(lines, "growth")
    logged = [(int(line["step"]), line["ranks"]) for line in _events(lines, "ranks")]
    summary = read_json(run.summary)
    return Run(
        path=run.path,
        name=name or run.path.resolve().name,
        config=config,
        summary=summary,
        metric=summary.get("metric") or read_json(run.adapter / GROWTH).get("metric"),
        finished=run.finished(int(steps[-1]["step"]) if steps else 0),
        steps=steps,
        validations=_events(lines, "validation"),
        growth=growth,
        ranks=logged or _reconstructed(run, config, growth),
        samples=_events(lines, "samples"),
        answers=_events(lines, "answers"),
    )


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read several runs, each under the shortest ending of its path that tells it from the others.

    Raises:
        QaromaError: one of them is no run, or was given twice.
    """
    parts = [Path(path).resolve().parts for path in paths]
    for place, path in enumerate(parts):
        if path in parts[:place]:
            raise QaromaError(f"{paths[place]} was given twice; give each run once")
    names = []
    for path in parts:
        length = 1
        while sum(other[-length:] == path[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(path[-length:]))
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_config(path: Path) -> dict[str, Any]:
    """Plain values: what a newer or an older version of qaroma wrote is readable too."""
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise QaromaError(
            f"{path} cannot be read as YAML ({error}); restore it from the run's configuration"
        ) from error
    return found if isinstance(found, dict) else {}


def _events(lines: Iterable[Record], name: str) -> list[Record]:
    return [line for line in lines if line.get("event") == name]


def _series(lines: Iterable[Record], key: str) -> Series:
    found = [(int(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), (int, float))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return Series([step for step, _ in finite], [value for _, value in finite])


def _reconstructed(
    run: RunDirectory, config: Mapping[str, Any], growth: Sequence[Record]
) -> list[tuple[int, Mapping[str, int]]]:
    """The ranks of a run whose log does not name them.

    AROMA and ReLoRA begin every module with one component; the growth events say the rest. Other
    methods keep the ranks that the adapter has.
    """
    saved = read_json(run.adapter_last / GROWTH) or read_json(run.adapter / GROWTH)
    components: Mapping[str, Sequence[int]] = saved.get("components", {})
    if config.get("method", "aroma") not in ("aroma", "relora"):
        ranks = {module: sum(inner) for module, inner in components.items()}
        return [(0, ranks)] if ranks else []
    inner = int(saved.get("inner_rank") or (config.get("growth") or {}).get("inner_rank") or 1)
    modules = list(components) or list(dict.fromkeys(event["module"] for event in growth))
    if not modules:
        return []
    after = {"commit": 1, "keep": 0, "done": -1}
    current = dict.fromkeys(modules, inner)
    found: list[tuple[int, Mapping[str, int]]] = [(0, dict(current))]
    for step, events in groupby(growth, key=lambda event: int(event["step"])):
        for event in events:
            current[event["module"]] = inner * (event["component"] + after[event["decision"]])
        found.append((step, dict(current)))
    return found
