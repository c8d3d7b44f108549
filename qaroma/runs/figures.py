"""The figures of a run, computed from what its directory holds: the same wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

from qaroma.config.metrics import METRICS, metric_facts
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.directory import WEIGHTS, RunDirectory
from qaroma.runs.reading import Record, Run, validation_of_adapter

_LARGEST = 1e18  # of a figure that anybody means; no NaN and no infinity is below it


@dataclass(frozen=True)
class Validation:
    """One metric of a run's validations: of the untrained model, of the adapter that is kept, and the last.

    The best is that of the kept adapter, whatever the metric, and as it stands: of one that was trimmed, after that.
    """

    name: str
    before: float | None
    best: float
    best_step: int
    last: float

    @property
    def after(self) -> float | None:
        """The best, where anything was measured after the beginning."""
        return self.best if self.best_step else None


@dataclass(frozen=True)
class Figures:
    """The figures of one run; None where it does not say.

    Attributes:
        validation: the metric that chooses the best adapter first, then the others that a task is judged by.
        exact_match_before, exact_match: share of held-out requests answered exactly, of the base and the last answers.
        rank_min, rank_mean, rank_max: over the modules of the best adapter; as last logged before there is one.
        trainable_start, trainable_mean, trainable_end, trainable_most: trainable parameters over the steps.
        adapter_parameters: numbers that the best adapter holds, after what trimming left out of it.
        step_seconds: median step.
        training_seconds: of all steps, and of what chooses directions between them, over all commands.
        seconds: of the run: its last command, or its training where that took longer (a run that was resumed).
        memory_bytes: the most at any step.
        growth_events: number of components that were committed, kept or given up.
    """

    validation: tuple[Validation, ...] = ()
    exact_match_before: float | None = None
    exact_match: float | None = None
    rank_min: int | None = None
    rank_mean: float | None = None
    rank_max: int | None = None
    trainable_start: int | None = None
    trainable_mean: float | None = None
    trainable_end: int | None = None
    trainable_most: int | None = None
    adapter_parameters: int | None = None
    step_seconds: float | None = None
    training_seconds: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    growth_events: int = 0

    def of(self, metric: str) -> Validation | None:
        """One metric's figures; None where no validation measured it."""
        return next((one for one in self.validation if one.name == metric), None)


def figures_of(run: Run) -> Figures:
    """All figures of a run, finished or not.

    What only the run itself knew (the parameters before the first step, the seconds between steps) is in the
    summary of a finished one; the rest is computed from the log.
    """
    memory = run.series("memory_bytes").values
    return Figures(
        validation=tuple(_validations(run)),
        exact_match_before=_exact_match(run, "before"),
        exact_match=_exact_match(run, "after"),
        **_ranks(run),
        **_trainable(run),
        adapter_parameters=adapter_parameters(RunDirectory(run.path).adapter, run.adapter) if run.adapter else None,
        **_seconds(run),
        memory_bytes=int(max(memory)) if memory else None,
        growth_events=len(run.growth),
    )


def validation_of(run: Run, metric: str) -> Validation | None:
    """One metric of a run's validations; the untrained model's figure counts as 'before' alone."""
    points, after = run.validation(metric).points, _after_start(run, metric)
    if not points:
        return None
    best_step, figures = kept_validation(run)
    best = _number(figures.get(metric))
    if best is None:
        best_step, best = metric_facts(metric).best(after)
    before = points[0][1] if points[0][0] == 0 else None
    return Validation(metric, before, best, best_step, after[-1][1])


def kept_validation(run: Run) -> tuple[int, Record]:
    """Step and figures of the validation of the adapter that a run keeps; no figures where there are none of it.

    The adapter remembers them, those after trimming where it was trimmed. Of an older one, or of none, the log has
    them: of its step, of the one that was chosen last, or of the best.
    """
    if run.adapter is not None and run.adapter.step:
        found = validation_of_adapter(run.adapter, run.validations)
        if found:
            return run.adapter.step, found
    step, after = run.chosen_step, _after_start(run, run.metric)
    if step is None and after:
        step, _ = metric_facts(run.metric).best(after)
    return step or 0, next((line for line in run.validations if line["step"] == step), {})


def _after_start(run: Run, metric: str) -> list[tuple[int, float]]:
    """Step and value of the validations after step 0, or of that alone where there is no other."""
    points = run.validation(metric).points
    return [point for point in points if point[0] > 0] or points


def _validations(run: Run) -> Iterator[Validation]:
    for name in dict.fromkeys((run.metric, *(name for name, row in METRICS.items() if row.judges))):
        found = validation_of(run, name)
        if found is not None:
            yield found


def _exact_match(run: Run, when: str) -> float | None:
    found = [line.get("exact_match") for line in run.answers if line.get("when") == when]
    return _number(found[-1]) if found else None


def _ranks(run: Run) -> dict[str, Any]:
    ranks = list((run.adapter_ranks() or run.last_ranks()).values())
    if ranks:
        return {"rank_min": min(ranks), "rank_mean": fmean(ranks), "rank_max": max(ranks)}
    means = run.series("mean_rank").values
    return {"rank_min": None, "rank_mean": means[-1] if means else None, "rank_max": None}


def _trainable(run: Run) -> dict[str, Any]:
    counts = [int(value) for value in run.series("trainable_parameters").values]
    start = _said(run, "trainable_parameters_start")
    before = [int(start)] if start is not None else []
    return {
        "trainable_start": next(iter(before + counts), None),
        "trainable_mean": fmean(counts) if counts else None,
        "trainable_end": counts[-1] if counts else None,
        "trainable_most": max(before + counts, default=None),
    }


def adapter_parameters(folder: Path, info: AdapterInfo) -> int | None:
    """How many numbers an adapter holds, its head's among them; None where its file cannot be read.

    Args:
        folder: of the adapter.
        info: what it remembers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # numpy's shapes: torch would take seconds to import.
        with safe_open(folder / WEIGHTS, framework="np") as file:
            sizes: dict[str, int] = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    # Where no module has a rank, the one pair that is there was written for PEFT's sake, all zeros.
    return sum(size for name, size in sizes.items() if any(info.ranks().values()) or ".lora_" not in name)


def _seconds(run: Run) -> dict[str, Any]:
    steps = run.series("seconds").values
    training = _said(run, "training_seconds")
    if training is None and len(steps) == len(run.steps) > 0:  # older runs did not note every step's
        training = sum(steps)
    return {
        "step_seconds": median(steps) if steps else None,
        "training_seconds": training,
        "seconds": max((s for s in (_said(run, "seconds"), training) if s is not None), default=None),
    }


def _said(run: Run, key: str) -> float | None:
    """A figure of the summary, which is of a run that ended alone."""
    return _number(run.summary.get(key)) if run.finished else None


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
    return value if usable else None


def as_json(run: Run) -> Mapping[str, Any]:
    """All that is known of a run but its settings and records, as plain JSON values."""
    return {
        "name": run.name,
        "path": run.path.as_posix(),
        "state": run.state,
        "problem": run.problem,
        "model": run.setting("model.name"),
        "data": ", ".join(run.sources()) or None,
        "method": run.setting("method"),
        "task": run.task if run.config else None,
        "steps": run.step,
        "total": run.budget,
        "checkpoint": run.checkpoint,
        "ended": run.ended,
        "metric": run.metric,
        **asdict(figures_of(run)),
        "bytes": run.bytes,
        "written": datetime.fromtimestamp(run.written).astimezone().isoformat(timespec="seconds"),
        "resume": run.resume,
    }
