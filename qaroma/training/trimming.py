"""The last act of growth: the adapter that is kept loses the directions that hardly carry anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from qaroma.config.metrics import metric_facts
from qaroma.config.resolved import BudgetGrowthSection, ResolvedGrowthSection
from qaroma.method.base import Method
from qaroma.method.trim import trim
from qaroma.training.fit import validation_metrics
from qaroma.training.memory import with_relief
from qaroma.training.saving import FitState
from qaroma.training.session import Session

WORSE = (
    1e-3  # of the validation figure, or so much of it where it is below 1; an adapter that loses more stays as it was
)


@dataclass(frozen=True)
class Trimming:
    """What became of an adapter's ranks.

    Attributes:
        before, after: sums over all modules; the same where the smaller update was not taken.
        figures: of the smaller update's validation; empty where nothing was validated.
        taken: whether it took the place of the whole one.
    """

    before: int
    after: int
    figures: Mapping[str, Any]
    taken: bool


def trim_method(
    method: Method,
    growth: ResolvedGrowthSection,
    validate: Callable[[], Mapping[str, Any]] | None,
    *,
    metric: str,
    best: float | None,
) -> Trimming | None:
    """Trim what a method that has finished holds; validation has the last word.

    Args:
        method: its factors are replaced where the smaller update is as good.
        growth: of the run.
        validate: the validation figures of the method's model as it stands; None where there is no validation row.
        metric: the one that judges.
        best: its value with the whole update.

    Returns:
        None where growth leaves nothing out, or nothing could go.
    """
    if not isinstance(growth, BudgetGrowthSection) or not growth.trim:
        return None
    whole, components = method.factors(), method.components()
    smaller = trim(whole, growth.trim)
    before, after = (sum(factors.rank for factors in update.values()) for update in (whole, smaller))
    if after == before:
        return None
    method.load_factors(smaller, {name: [factors.rank] for name, factors in smaller.items()})
    figures = validate() if validate is not None else {}
    taken = not figures or best is None or _as_good(figures[metric], best, metric)
    if not taken:
        method.load_factors(whole, components)
    return Trimming(before, after if taken else before, figures, taken)


def _as_good(value: float, best: float, metric: str) -> bool:
    return metric_facts(metric).better(value, best) or abs(value - best) <= WORSE * max(1.0, abs(best))


def trim_adapter(session: Session, state: FitState, console: Console) -> None:
    """Trim the adapter of a run that has ended, and write it to ``run.adapter`` with its figures; logged and said.

    Args:
        session: the adapter that is to be kept stands in its model.
        state: where the run ended.
        console: what happened is said there.
    """
    metric = session.task.metric

    def validate() -> dict[str, Any]:
        return with_relief(session, lambda: validation_metrics(session), "validation", console)

    found = trim_method(
        session.method,
        session.config.growth,
        validate if session.validation else None,
        metric=metric,
        best=state.best,
    )
    if found is None:
        return
    session.log.write_new([{"event": "trim", "step": state.step, **asdict(found)}])
    told = f"validation {metric} {metric_facts(metric).text(found.figures[metric])}" if found.figures else ""
    if not found.taken:
        console.print(f"every direction is kept: without the smallest ones {told}", highlight=False)
        return
    step = state.best_step if state.best is not None else state.step
    session.save_adapter(session.run.adapter, step, found.figures)
    gone = f"{found.before - found.after} of {found.before} directions were hardly used and are left out"
    console.print(f"{gone}: {told}" if told else gone, highlight=False)
