"""Growth within a budget: how much rank a run needs is told from how its loss falls, with no unit in it.

The two loops of the paper ask how large a component is, which says what the learning rate was. This machine
asks whether the run will get there: rank is needed as long as the loss, at the speed of the present rank, will
not have fallen to next to nothing when the steps are over. Like :mod:`qaroma.method.growth` it takes numbers and
gives decisions, and knows no tensor and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

GOAL = 0.05  # of the first loss: what a run that memorises is to reach
GOAL_TIME = 0.9  # of the steps: when it is to be there
LEARNT = 0.01  # of the first loss: below it nothing is left to learn
LEARNT_STEPS = 10  # over so many steps
LAST_GROWTH = 0.5  # of the steps: a component that begins later hardly pays
CHECKS = 20  # in a run
SHORTEST_CHECK = 8  # steps: fewer say nothing of how the loss falls
LARGEST_GROWTH = 2.0  # at once


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """What a run that grows within a budget is asked for (``qaroma.config.GrowthSection`` explains each).

    Raises:
        ValueError: no rank to begin with, or one above the budget.
    """

    start_rank: int
    max_rank: int
    window: int | None = None
    warmup: int = 6
    min_lr_ratio: float = 0.1
    measured_rate: bool = True
    max_update: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.start_rank <= self.max_rank:
            raise ValueError(f"start_rank {self.start_rank} must lie between 1 and max_rank {self.max_rank}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"at least one component trains, got a window of {self.window}")


@dataclass
class BudgetState:
    """Where a run stands that grows within a budget; which modules get the rank that is missing is not said here.

    Args:
        settings: the choices.
        total_steps: step budget T.
        rank: of the modules, their mean now.
        step: optimiser steps done.
        born: step at which each component began, oldest first.
        first_loss: mean training loss of the first step.
        losses: of the last three intervals between checks.
        halted: validation has worsened: nothing grows any more.
        learnt: step at which nothing was left to learn; the rate then falls to zero, and the run ends.
    """

    settings: BudgetSettings
    total_steps: int
    rank: int
    step: int = 0
    born: list[int] = field(default_factory=lambda: [0])
    first_loss: float | None = None
    losses: list[float] = field(default_factory=list)
    best_validation: float | None = None
    halted: bool = False
    learnt: int | None = None

    @classmethod
    def start(cls, settings: BudgetSettings, total_steps: int) -> BudgetState:
        return cls(settings, total_steps, settings.start_rank)

    @property
    def interval(self) -> int:
        """Steps between two checks."""
        return max(SHORTEST_CHECK, self.total_steps // CHECKS)

    @property
    def end(self) -> int:
        """The step at which the run is over, by the budget or because everything is learnt."""
        if self.learnt is None:
            return self.total_steps
        return min(self.total_steps, self.learnt + max(SHORTEST_CHECK, self.learnt // 2))

    @property
    def finished(self) -> bool:
        """Whether the run ends by itself."""
        return self.learnt is not None and self.step >= self.end

    def observe(self, loss: float) -> int:
        """Count a step and its mean training loss, as it was before the update.

        Returns:
            By how much the mean rank grows now; mostly 0.
        """
        self.step += 1
        if self.first_loss is None:
            self.first_loss = loss
        self.losses = [*self.losses, loss][-max(3 * self.interval, LEARNT_STEPS) :]
        recent = self.losses[-LEARNT_STEPS:]
        if self.learnt is None and len(recent) == LEARNT_STEPS and _mean(recent) < LEARNT * self.first_loss:
            self.learnt = self.step
        grown = self._missing_rank() if self._may_grow() else 0
        if grown:
            self.rank += grown
            self.born.append(self.step)
        return grown

    @property
    def may_still_grow(self) -> bool:
        """Whether a later step could add rank, so that it is worth knowing which modules pay."""
        in_time = self.step < LAST_GROWTH * self.total_steps
        return in_time and not self.halted and self.learnt is None and self.rank < self.settings.max_rank

    def validated(self, loss: float, standard_error: float) -> None:
        """Take a validation: worse than the best one by more than two standard errors, it ends growth.

        Args:
            loss: mean loss of the validation rows.
            standard_error: of that mean.
        """
        if self.best_validation is None or loss < self.best_validation:
            self.best_validation = loss
        elif loss > self.best_validation + 2 * standard_error:
            self.halted = True

    def rate_factor(self) -> float:
        """What the fall to zero after everything is learnt leaves of the next update's learning rate."""
        if self.learnt is None:
            return 1.0
        return max(0.0, (self.end - self.step) / (self.end - self.learnt))

    def _may_grow(self) -> bool:
        due = self.step % self.interval == 0 and self.step - self.born[-1] >= self.interval
        return due and len(self.losses) >= 2 * self.interval and self.may_still_grow

    def _missing_rank(self) -> int:
        """The rank that is missing, progress going as the rank, for the loss to reach its goal in time.

        A fall that slows as the loss becomes less is taken to go on as an exponential, one that does not slow along a
        straight line, and one that slows less along a power of what is left of the time.
        """
        assert self.first_loss is not None
        goal, left = GOAL * self.first_loss, GOAL_TIME * self.total_steps - self.step
        *earlier, before, now = self._means()
        if not now > goal > 0:
            return 0
        intervals = math.inf
        if now < before:
            power = 1.0 - (_slowing(earlier[0], before, now) if earlier else 0.0)
            far, near, end = (loss**power if power else math.log(loss) for loss in (before, now, goal))  # fall evenly
            intervals = (near - end) / (far - near) - 0.5  # the mean is where the loss was half an interval ago
        missing = intervals * self.interval / left
        if missing <= 1:
            return 0
        wanted = math.ceil(self.rank * min(missing, LARGEST_GROWTH))
        return max(0, min(wanted, self.settings.max_rank) - self.rank)

    def _means(self) -> list[float]:
        """Mean loss of the last whole intervals, oldest first."""
        whole = len(self.losses) // self.interval
        return [_mean(self.losses[-k * self.interval :][: self.interval]) for k in range(whole, 0, -1)]

    def to_json(self) -> dict[str, Any]:
        """Everything but the settings and the budget, as JSON values; floats survive exactly."""
        return {key: value for key, value in asdict(self).items() if key not in ("settings", "total_steps")}

    def load_json(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def allotted(rank: int, credit: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Which modules get the rank that is missing: the half that pays most, twice the mean each.

    Args:
        rank: by which the mean rank grows.
        credit: of each module, what its last updates took off the loss.
        sizes: parameters of one rank-one component of each module; the budget is ``rank`` times their sum.

    Returns:
        Module -> rank to add, without those that get none: from the most credit a parameter downwards, until the
        budget is spent.
    """
    left, added = rank * sum(sizes.values()), {}
    for name in sorted(sizes, key=lambda module: credit[module] / sizes[module], reverse=True):
        share = min(2 * rank, left // sizes[name])
        if share > 0:
            added[name] = share
            left -= share * sizes[name]
    return added


def _slowing(first: float, before: float, now: float) -> float:
    """The power of the loss that the speed of its fall goes with, from 0 (a straight line) to 1 (an exponential).

    Args:
        first, before, now: mean loss of three intervals, of which the last one's is less than the one's before.
    """
    if not before < first < math.inf:
        return 0.0
    power = math.log((before - now) / (first - before)) / math.log((before + now) / (first + before))
    return min(1.0, max(0.0, power))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
