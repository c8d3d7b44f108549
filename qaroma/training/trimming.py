"""The last act of growth: the adapter that is kept loses the directions that hardly carry anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

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
        value: validation figure of the smaller update; None where nothing was validated.
        taken: whether it took the place of the whole one.
    """

    before: int
    after: int
    value: float | None
    taken: bool


def trim_method(
    method: Method,
    growth: ResolvedGrowthSection,
    measure: Callable[[], float] | None,
    *,
    metric: str,
    best: float | None,
) -> Trimming | None:
    """Trim what a method that has finished holds; validation has the last word.

    Args:
        method: its factors are replaced where the smaller update is as good.
        growth: of the run.
        measure: the validation figure of the method's model as it stands; None where there is no validation row.
        metric: what that figure is.
        best: the same figure of the whole update.

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
    value = measure() if measure is not None else None
    taken = value is None or best is None or _as_good(value, best, metric)
    if not taken:
        method.load_factors(whole, components)
    return Trimming(before, after if taken else before, value, taken)


def _as_good(value: float, best: float, metric: str) -> bool:
    return metric_facts(metric).better(value, best) or abs(value - best) <= WORSE * max(1.0, abs(best))


def trim_adapter(session: Session, state: FitState, console: Console) -> None:
    """Trim the adapter of a run that has ended, and write it to ``run.adapter``; logged and said.

    Args:
        session: the adapter that is to be kept stands in its model.
        state: where the run ended.
        console: what happened is said there.
    """
    metric = session.task.metric

    def measure() -> float:
        return float(with_relief(session, lambda: validation_metrics(session), "validation", console)[metric])

    found = trim_method(
        session.method,
        session.config.growth,
        measure if session.validation else None,
        metric=metric,
        best=state.best,
    )
    if found is None:
        return
    session.log.write_new([{"event": "trim", "step": state.step, **asdict(found)}])
    if not found.taken:
        console.print(f"every direction is kept: without the smallest ones {_told(metric, found)}", highlight=False)
        return
    session.save_adapter(session.run.adapter, state.best_step if state.best is not None else state.step)
    gone = f"{found.before - found.after} of {found.before} directions were hardly used and are left out"
    console.print(f"{gone}: {_told(metric, found)}" if found.value is not None else gone, highlight=False)


def _told(metric: str, found: Trimming) -> str:
    assert found.value is not None
    return f"validation {metric} {metric_facts(metric).text(found.value)}"
