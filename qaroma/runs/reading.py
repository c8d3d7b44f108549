"""A run as its directory tells it: settings, records, ranks, and how far it came. Nothing here loads a model.

Reads finished, running, stopped and broken runs of every method and task, and runs of older versions; what
a run lacks is empty here, never an error.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import yaml

from qaroma.config.methods import DEFAULT_METHOD, METHODS
from qaroma.config.metrics import metrics_of
from qaroma.errors import QaromaError
from qaroma.runs.adapter_info import AdapterInfo, info_if_any
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import read_json
from qaroma.runs.lock import LOCK, owner_is_gone
from qaroma.runs.log import read_records
from qaroma.text.yaml_text import read_yaml

# A run that another machine has is taken to be at work where it wrote so recently: its process cannot be looked for.
FRESH_SECONDS = 120.0
_CHECKPOINT = re.compile(r"step-(\d+)")
_NO_METRICS = ("event", "step", "tokens", "examples", "chosen")

Record = Mapping[str, Any]
State = Literal["finished", "running", "stopped", "broken"]


@dataclass(frozen=True)
class Series:
    """Values against the optimiser step."""

    steps: Sequence[int] = ()
    values: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def points(self) -> list[tuple[int, float]]:
        """Pairs of step and value."""
        return list(zip(self.steps, self.values, strict=True))

    def until(self, step: int) -> Series:
        """The same series with its last value held up to ``step``."""
        if not self.steps or self.steps[-1] >= step:
            return self
        return Series([*self.steps, step], [*self.values, self.values[-1]])


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        path: the directory.
        name: what the run is called where several are shown.
        state: finished, running (a process has its lock), stopped or broken.
        problem: what is wrong with a broken one, of which the rest may be missing.
        config: ``config.yaml`` as plain values.
        summary: ``summary.json``; empty while the run goes on, and in older runs.
        adapter: what its best adapter remembers; None before there is one.
        steps, validations, growth: lines of optimiser steps, validations and growth events.
        ranks: step, and the rank of each module from that step on.
        samples: answers to chosen prompts while training.
        answers: the generation test before and after training.
        checkpoint: step of the newest checkpoint.
        written: last change, seconds since 1970.
    """

    path: Path
    name: str
    state: State = "stopped"
    problem: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    adapter: AdapterInfo | None = None
    steps: Sequence[Record] = ()
    validations: Sequence[Record] = ()
    growth: Sequence[Record] = ()
    ranks: Sequence[tuple[int, Mapping[str, int]]] = ()
    samples: Sequence[Record] = ()
    answers: Sequence[Record] = ()
    checkpoint: int | None = None
    written: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the run ended, and was not resumed to go further."""
        return self.state == "finished"

    @property
    def ended(self) -> str | None:
        """Why a finished run ended: grown, budget or patience."""
        ended = self.summary.get("ended") if self.finished else None
        return ended if isinstance(ended, str) else None

    @property
    def device(self) -> str | None:
        """What a finished run computed on: ``cpu`` or the GPU's name; None where it does not say."""
        device = self.summary.get("device") if self.finished else None
        return device if isinstance(device, str) else None

    @property
    def resume(self) -> str | None:
        """The command that goes on with a stopped run."""
        return RunDirectory(self.path).resume_command if self.state == "stopped" else None

    @property
    def method(self) -> str:
        return str(self.config.get("method") or DEFAULT_METHOD)

    @property
    def method_title(self) -> str:
        """The method as figures and pages call it."""
        return METHODS[self.method].title if self.method in METHODS else self.method

    @property
    def grows(self) -> bool:
        """Whether the method finds its ranks."""
        return self.method in METHODS and METHODS[self.method].grows

    @property
    def task(self) -> str:
        return str(self.config.get("task") or "causal-lm")

    @property
    def step(self) -> int:
        """The last optimiser step that was logged."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def budget(self) -> int | None:
        """The step budget T, where the configuration names it."""
        found = self.setting("training.max_steps")
        return found if isinstance(found, int) else None

    @property
    def bytes(self) -> int:
        """Of all its files; one that lies in several places counts once."""
        sizes = {}
        for file in self.path.rglob("*"):
            try:
                found = file.lstat()
                sizes[found.st_dev, found.st_ino] = found.st_size if file.is_file() else 0
            except OSError:  # a checkpoint that a running run removes meanwhile
                continue
        return sum(sizes.values())

    @cached_property
    def metric(self) -> str:
        """The validation metric that chooses the best adapter; where the run does not say, the task's usual one."""
        remembered = self.adapter.task.metric if self.adapter else None
        said = self.summary.get("metric") or remembered or self.setting("evaluation.metric")
        candidates = [str(name) for name in (said, *metrics_of(self.task), "loss") if name]
        measured = self.metrics()
        return next((name for name in candidates if name in measured), candidates[0])

    def setting(self, key: str) -> Any:
        """One value of the configuration by its dotted key; None where it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def sources(self) -> list[str]:
        """What it was trained on, as typed."""
        given = self.setting("data.train")
        return [str(one.get("path")) for one in given if isinstance(one, dict)] if isinstance(given, list) else []

    def series(self, key: str) -> Series:
        """One figure of the optimiser steps, finite values only."""
        return _series(self.steps, key)

    def validation(self, metric: str) -> Series:
        """One metric of the validations, finite values only."""
        return _series(self.validations, metric)

    @property
    def chosen_step(self) -> int | None:
        """The step of the adapter that validation has chosen, as the log says it; None where it says none."""
        chosen = [int(line["step"]) for line in self.validations if line.get("chosen") is True]
        return chosen[-1] if chosen else None

    def metrics(self) -> list[str]:
        """Names of all that validations measured, in the order of the log."""
        return list(dict.fromkeys(key for line in self.validations for key in line if key not in _NO_METRICS))

    def modules(self) -> list[str]:
        """Full names of the target modules, in the model's order."""
        return list(self.ranks[-1][1]) if self.ranks else []

    def last_ranks(self) -> Mapping[str, int]:
        """Rank of each module at the last step."""
        return self.ranks[-1][1] if self.ranks else {}

    def adapter_ranks(self) -> dict[str, int]:
        """Rank of each module of the best adapter; empty before there is one."""
        return self.adapter.ranks() if self.adapter else {}

    def total_rank(self) -> Series:
        """The sum of all modules' ranks from each step at which it changed."""
        return Series([step for step, _ in self.ranks], [sum(ranks.values()) for _, ranks in self.ranks])

    def module_rank(self, module: str) -> Series:
        """One module's rank from each step at which any rank changed."""
        found = [(step, ranks[module]) for step, ranks in self.ranks if module in ranks]
        return Series([step for step, _ in found], [rank for _, rank in found])


def read_run(path: str | Path, name: str | None = None) -> Run:
    """One run directory, whatever state it is in.

    Args:
        path: ``runs/NAME``.
        name: what to call it; None is the directory's own name.

    Returns:
        The record; its ``state`` is broken where the configuration or the log cannot be read.
    """
    run = RunDirectory(path)
    known: dict[str, Any] = {"path": run.path, "name": name or run.path.resolve().name, "written": _written(run)}
    try:
        known["config"] = read_settings(run)
        return Run(**known, **_read_rest(run, known["config"], known["written"]))
    except QaromaError as broken:
        return Run(**known, state="broken", problem=str(broken))
    except OSError as refused:
        return Run(**known, state="broken", problem=f"the system refuses to read it ({refused.strerror})")


def validation_of_adapter(info: AdapterInfo, validations: Sequence[Record]) -> Record:
    """The validation figures of an adapter: as it remembers them, or as a log has them of its step; else empty.

    Args:
        info: what the adapter remembers.
        validations: lines of the log.
    """
    return info.validation or next((line for line in validations if line["step"] == info.step), {})


def _written(run: RunDirectory) -> float:
    """The time of the last change of what a run writes."""
    times = [_changed(file) for file in (run.metrics, run.config, run.summary)]
    return max(times) or _changed(run.path)


def _changed(path: Path) -> float:
    """The time of a file's last change; 0 where it is not there, or not this user's to see."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def read_settings(run: RunDirectory) -> dict[str, Any]:
    """A run's ``config.yaml`` as plain values: what a newer or an older version of qaroma wrote is readable too.

    Raises:
        QaromaError: there is none, or none that a run has.
    """
    if not run.exists():
        raise QaromaError(f"it has no {run.config.name}")
    try:
        found, _ = read_yaml(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise QaromaError(f"{run.config.name} cannot be read") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise QaromaError(f"{run.config.name} is no configuration of a run")
    return found


def _read_rest(run: RunDirectory, config: Mapping[str, Any], written: float) -> dict[str, Any]:
    """All but the configuration, by the names of :class:`Run`.

    Raises:
        QaromaError: a log that cannot be read.
    """
    lines = read_records(run)
    try:
        steps = [line for line in lines if "event" not in line and isinstance(line.get("step"), int)]
        growth = _events(lines, "growth")
        logged = [(int(line["step"]), line["ranks"]) for line in _events(lines, "ranks")]
        last = int(steps[-1]["step"]) if steps else 0
        return {
            # One that was finished and then resumed is not finished any more.
            "state": "finished" if _finished(run, last) else "running" if _at_work(run, written) else "stopped",
            "summary": read_json(run.summary),
            "adapter": info_if_any(run.adapter),
            "steps": steps,
            "validations": _events(lines, "validation"),
            "growth": growth,
            "ranks": logged or _reconstructed(run, config, growth),
            "samples": _answers(lines, "samples"),
            "answers": _answers(lines, "answers"),
            "checkpoint": _newest_checkpoint(run),
        }
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise QaromaError(f"{run.metrics.name} holds lines of another form") from error


def _at_work(run: RunDirectory, written: float) -> bool:
    """Whether a process has the run: one of this machine by its lock, one of another by what it wrote lately."""
    gone = owner_is_gone(run.path)
    if gone is not None:
        return not gone
    return (run.path / LOCK).is_file() and time.time() - written < FRESH_SECONDS


def _finished(run: RunDirectory, last: int) -> bool:
    """As :meth:`RunDirectory.finished`, for runs of older versions too, which have no summary.

    One of those is over when its last adapter is of its last step.
    """
    if read_json(run.summary):
        return run.finished(last)
    info = info_if_any(run.adapter_last)
    return info is not None and info.step is not None and info.step >= last


def _newest_checkpoint(run: RunDirectory) -> int | None:
    found = (_CHECKPOINT.fullmatch(path.name) for path in run.checkpoints.glob("step-*"))
    return max((int(match[1]) for match in found if match), default=None)


def _events(lines: Iterable[Record], name: str) -> list[Record]:
    return [line for line in lines if line.get("event") == name]


def _answers(lines: Iterable[Record], name: str) -> list[Record]:
    """Events with answers to prompts, whole ones only: lists of texts."""
    found = _events(lines, name)
    return [line for line in found if all(_texts(line.get(key, [])) for key in ("prompts", "answers", "expected"))]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _series(lines: Iterable[Record], key: str) -> Series:
    found = [(int(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), (int, float))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return Series([step for step, _ in finite], [value for _, value in finite])


def _reconstructed(
    run: RunDirectory, config: Mapping[str, Any], growth: Sequence[Record]
) -> list[tuple[int, Mapping[str, int]]]:
    """The ranks of a run whose log does not name them.

    Methods that grow begin every module with one component; the growth events say the rest. The others
    keep the ranks that the adapter has.
    """
    saved = info_if_any(run.adapter_last) or info_if_any(run.adapter)
    ranks = saved.ranks() if saved else {}
    method = METHODS.get(config.get("method") or DEFAULT_METHOD)
    if method is None or not method.grows:
        return [(0, ranks)] if ranks else []
    inner = saved.inner_rank if saved else int((config.get("growth") or {}).get("inner_rank") or 1)
    modules = list(ranks) or list(dict.fromkeys(event["module"] for event in growth))
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
