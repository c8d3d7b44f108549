"""The figures of a comparison, read from its run directories alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qaroma.compare.specs import MethodSpec
from qaroma.compare.statistics import deviation, mean, median
from qaroma.method.spectrum import effective_rank
from qaroma.report.reading import Run, read_run
from qaroma.runs.adapter import read_adapter
from qaroma.runs.directory import RunDirectory

LORAS = ("lora", "peft-lora")
REFERENCE_RANK = 8  # of the LoRA that figures are divided by, where it takes part


@dataclass(frozen=True)
class RunFigures:
    """One finished run.

    Parameters are the adapter's alone, ranks those of the last adapter. ``seconds`` is the median step
    times the steps, and what passes that choose directions took beside them: a machine that was busy
    for a while does not show.
    """

    seed: int
    run: str
    metric: str
    last: float | None
    best: float | None
    exact_match: float | None
    parameters_start: int
    parameters_mean: float
    parameters_end: int
    parameters_most: int
    modules: int
    rank: int
    effective_rank: float
    steps: int
    ended: str
    step_seconds: float
    seconds: float
    memory_bytes: int

    @property
    def effective_share(self) -> float | None:
        """Effective rank / rank over all modules; None where every rank is 0."""
        return self.effective_rank / self.rank if self.rank else None


@dataclass(frozen=True)
class MethodFigures:
    """One method's finished runs, and what became of the others."""

    spec: MethodSpec
    runs: Sequence[RunFigures]
    failed: Mapping[int, str]

    def by_seed(self, key: str) -> dict[int, float]:
        """One figure of each run that has it, by seed."""
        found = {run.seed: getattr(run, key) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, key: str) -> float | None:
        """The mean over seeds; None where no run has it."""
        values = list(self.by_seed(key).values())
        return mean(values) if values else None

    def deviation(self, key: str) -> float | None:
        return deviation(list(self.by_seed(key).values()))

    def ratio(self, key: str, reference: MethodFigures | None) -> float | None:
        """The mean over seeds, divided by another method's."""
        ours, theirs = self.mean(key), reference.mean(key) if reference else None
        return None if ours is None or not theirs else ours / theirs

    def most_against(self, reference: MethodFigures | None) -> float | None:
        """The largest share of another method's trainable parameters, at any moment of any run."""
        theirs = reference.mean("parameters_start") if reference else None
        return max(run.parameters_most for run in self.runs) / theirs if self.runs and theirs else None

    def to_json(self, reference: MethodFigures | None) -> dict[str, Any]:
        keys = ("last", "best", "exact_match", "parameters_start", "parameters_mean", "parameters_end", "rank",
                "effective_rank", "effective_share", "steps", "seconds", "memory_bytes")  # fmt: skip
        return {
            "method": self.spec.label,
            "n": len(self.runs),
            "mean": {key: self.mean(key) for key in keys},
            "sd": {key: self.deviation(key) for key in keys},
            "ratio": {
                "parameters_most": self.most_against(reference),
                "parameters_mean": self.ratio("parameters_mean", reference),
                "seconds": self.ratio("seconds", reference),
                "memory_bytes": self.ratio("memory_bytes", reference),
            },
            "runs": [{**asdict(run), "effective_share": run.effective_share} for run in self.runs],
            "failed": {str(seed): reason for seed, reason in self.failed.items()},
        }


def reference_of(methods: Sequence[MethodFigures]) -> MethodFigures | None:
    """The LoRA that figures are divided by: that of rank 8, or the first one; None where there is none."""
    loras = [m for m in methods if m.spec.method in LORAS and m.runs]
    return next((m for m in loras if m.spec.rank == REFERENCE_RANK), loras[0] if loras else None)


def is_finished(folder: Path) -> bool:
    """Whether a run ended and its last adapter is there."""
    run = RunDirectory(folder)
    return run.summary.is_file() and run.adapter_last.is_dir() and run.finished(run.last_step())


def read_figures(folder: Path, seed: int) -> RunFigures:
    """The figures of a finished run."""
    log = read_run(folder)
    summary = log.summary
    rank, effective, modules = _ranks(RunDirectory(folder).adapter_last)
    seconds = [float(line["seconds"]) for line in log.steps]
    step_seconds = median(seconds)
    beside_steps = max(0.0, summary["training_seconds"] - sum(seconds))
    start = summary["trainable_parameters_start"]
    return RunFigures(
        seed=seed,
        run=folder.name,
        metric=summary["metric"],
        last=summary["metric_last"],
        best=summary["metric_best"],
        exact_match=summary["exact_match"],
        parameters_start=start,
        parameters_mean=summary["trainable_parameters_mean"],
        parameters_end=summary["trainable_parameters_end"],
        parameters_most=max([start, *(line["trainable_parameters"] for line in log.steps)]),
        modules=modules,
        rank=rank,
        effective_rank=effective,
        steps=summary["steps"],
        ended=summary["ended"],
        step_seconds=step_seconds,
        seconds=step_seconds * summary["steps"] + beside_steps,
        memory_bytes=summary["memory_bytes"],
    )


def read_logs(methods: Sequence[MethodFigures], folder: Path) -> dict[str, list[Run]]:
    """The logs of every method's finished runs, for curves."""
    return {m.spec.label: [read_run(folder / run.run) for run in m.runs] for m in methods if m.runs}


def _ranks(adapter: Path) -> tuple[int, float, int]:
    """Total rank, total effective rank, and number of modules of a saved adapter."""
    saved = read_adapter(adapter)
    effective = sum(effective_rank(*factors) for factors in saved.update.values())
    return sum(saved.info.ranks().values()), effective, len(saved.info.components)
