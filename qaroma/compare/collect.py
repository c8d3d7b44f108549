"""The figures of a comparison, read from its run directories alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qaroma.compare.specs import MethodSpec
from qaroma.compare.statistics import deviation, mean
from qaroma.config.methods import METHODS
from qaroma.errors import QaromaError
from qaroma.report.spectra import read_spectra
from qaroma.runs.figures import figures_of
from qaroma.runs.reading import Run

REFERENCE_RANK = 8  # of the LoRA that figures are divided by, where it takes part


@dataclass(frozen=True)
class RunFigures:
    """One finished run.

    Parameters are the adapter's alone, ranks those of the best adapter. ``seconds`` is the median step
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

    @property
    def family(self) -> str:
        """The method that it is a variant of."""
        return METHODS[self.spec.method].family

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
    loras = [m for m in methods if m.family == "lora" and m.runs]
    return next((m for m in loras if m.spec.rank == REFERENCE_RANK), loras[0] if loras else None)


def collect(run: Run, seed: int) -> RunFigures:
    """The figures of a finished run.

    Raises:
        QaromaError: it has no adapter any more.
    """
    figures, spectra = figures_of(run), read_spectra(run)
    if spectra is None:
        raise QaromaError(f"{run.path} has no adapter any more; delete the run and type the same command again")
    judged, step_seconds = figures.of(run.metric), figures.step_seconds or 0.0
    beside_steps = max(0.0, (figures.training_seconds or 0.0) - sum(run.series("seconds").values))
    return RunFigures(
        seed=seed,
        run=run.path.name,
        metric=run.metric,
        last=judged.last if judged else None,
        best=judged.best if judged else None,
        exact_match=figures.exact_match,
        parameters_start=figures.trainable_start or 0,
        parameters_mean=figures.trainable_mean or 0.0,
        parameters_end=figures.trainable_end or 0,
        parameters_most=figures.trainable_most or 0,
        modules=len(spectra.ranks),
        rank=sum(spectra.ranks.values()),
        effective_rank=sum(spectra.effective.values()),
        steps=run.step,
        ended=str(run.ended),
        step_seconds=step_seconds,
        seconds=step_seconds * run.step + beside_steps,
        memory_bytes=figures.memory_bytes or 0,
    )
