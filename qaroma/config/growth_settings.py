"""From the resolved growth section to what a method takes, every value by its name."""

from __future__ import annotations

from dataclasses import replace

from qaroma.config.resolved import BudgetGrowthSection, GrowingSection, MeasuredGrowthSection, ResolvedGrowthSection
from qaroma.errors import QaromaError
from qaroma.method.budget import BudgetSettings
from qaroma.method.growth import GrowthSettings


def growth_settings(growth: ResolvedGrowthSection) -> GrowthSettings | BudgetSettings | None:
    """The resolved section as the method takes it; None for a method of fixed rank.

    Args:
        growth: resolved; without criteria where it is no measured one.

    Raises:
        QaromaError: settings that contradict each other.
    """
    if isinstance(growth, BudgetGrowthSection):
        return _budget_settings(growth)
    return _loop_settings(growth) if isinstance(growth, GrowingSection) else None


def _window(growth: GrowingSection | BudgetGrowthSection) -> int | None:
    return None if growth.window == "all" else growth.window


def _budget_settings(growth: BudgetGrowthSection) -> BudgetSettings:
    if growth.start_rank > growth.max_rank:
        raise QaromaError(
            f"max_rank {growth.max_rank} is less than the {growth.start_rank} that every module begins with; "
            f"type --set growth.start_rank={growth.max_rank} or less, or a larger growth.max_rank"
        )
    return BudgetSettings(
        start_rank=growth.start_rank,
        max_rank=growth.max_rank,
        window=_window(growth),
        warmup=growth.warmup,
        min_lr_ratio=growth.min_lr_ratio,
        measured_rate=growth.measured_rate,
        max_update=growth.max_update,
    )


def _loop_settings(growth: GrowingSection) -> GrowthSettings:
    if growth.max_rank is not None and growth.max_rank < growth.inner_rank:
        raise QaromaError(
            f"max_rank {growth.max_rank} holds no component of inner_rank {growth.inner_rank}; "
            f"type --set growth.max_rank={growth.inner_rank} or more, or a smaller growth.inner_rank"
        )
    try:
        settings = GrowthSettings(
            criteria=False,
            t_in=growth.t_in,
            init=growth.init,
            schedule=growth.schedule,
            reset=growth.reset,
            max_rank=growth.max_rank,
            window=_window(growth),
            warmup=growth.warmup,
            restart_warmup=growth.restart_warmup,
            min_lr_ratio=growth.min_lr_ratio,
            max_update=growth.max_update,
        )
    except ValueError as error:
        raise QaromaError(f"{error}; change growth.t_in or the warm-ups, or leave them to the preset") from error
    if not isinstance(growth, MeasuredGrowthSection):
        return settings
    return replace(
        settings,
        criteria=True,
        check_every=growth.check_every,
        eps_in=growth.eps_in,
        eps_out=growth.eps_out,
        inner_criterion=growth.inner_criterion,
        outer_criterion=growth.outer_criterion,
        on_converged=growth.on_converged,
        check_first=growth.check_first,
    )
