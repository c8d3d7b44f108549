"""Growth within a budget: decisions from losses alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from qaroma.method.budget import BudgetSettings, BudgetState

STEPS = 160  # a check every 8


def state(start: int = 2, largest: int = 16, steps: int = STEPS) -> BudgetState:
    return BudgetState.start(BudgetSettings(start_rank=start, max_rank=largest), steps)


def follow(growth: BudgetState, loss: Callable[[int], float], until: int = STEPS) -> dict[int, int]:
    """Step -> rank that was added then."""
    grown = {}
    while growth.step < until:
        added = growth.observe(loss(growth.step))
        if added:
            grown[growth.step] = added
    return grown


def test_a_loss_that_does_not_fall_doubles_the_rank_at_every_check_up_to_the_bound() -> None:
    growth = state(largest=15)
    assert follow(growth, lambda step: 1.0) == {16: 2, 24: 4, 32: 7}
    assert (growth.rank, growth.born) == (15, [0, 16, 24, 32])


def test_rank_is_added_by_as_much_as_the_fall_is_too_slow() -> None:
    growth = state(start=8, largest=32)
    follow(growth, lambda step: math.exp(-step / STEPS), until=16)
    assert growth.rank == 9  # 0.86 to go at 0.0060 a step, 128 steps left: 1.12 times as fast would do
    assert growth.born == [0, 16]


PAIRS = (3.137, 2.703, 2.222, 1.917, 1.696, 1.509, 1.339, 1.192, 1.055)


def test_a_fall_that_slows_is_not_taken_to_go_on_as_fast() -> None:
    """2,048 random pairs at rank 8, which does not learn them all: by straight lines half of the steps were enough."""
    growth = state(start=8, steps=6400)
    follow(growth, lambda step: PAIRS[step // 320] if step else 5.11, until=1919)
    assert growth.born == [0, 1600]
    assert growth.rank == 10  # the exponential needs 1.15 times the steps that are left


def test_what_slows_less_than_an_exponential_lies_between() -> None:
    growth = state(start=8, largest=32)
    follow(growth, lambda step: (1 - 0.7 * step / STEPS) ** 2, until=24)  # as fast as its square root is large
    assert growth.born == [0, 24]  # before, two intervals told of no slowing: a line needs 0.76 of the steps left
    assert growth.rank == 11  # 154 steps for 120, by the square root, which falls along a line


@pytest.mark.parametrize(
    "loss",
    [
        lambda step: 1.0 - step / (0.85 * STEPS),  # a line that is there in time
        lambda step: math.exp(-4.0 * step / STEPS),  # an exponential that is, where its tangents are too late
        lambda step: 0.9 if step < 8 else 0.04,  # there already
    ],
)
def test_nothing_grows_where_the_loss_reaches_its_goal_in_time(loss: Callable[[int], float]) -> None:
    assert follow(state(), loss, until=120) == {}


def test_nothing_grows_after_half_of_the_steps() -> None:
    assert follow(state(), lambda step: 1.0 if step > 72 else 1.0 - step / 120) == {}
    assert list(follow(state(), lambda step: 1.0 if step > 64 else 1.0 - step / 120)) == [72]


def test_a_validation_that_is_worse_by_more_than_two_standard_errors_ends_growth() -> None:
    growth = state()
    for loss in (1.2, 1.0, 1.19, 1.1):  # against the best one, not the last
        growth.validated(loss, 0.1)
    assert not growth.halted
    growth.validated(1.21, 0.1)
    growth.validated(0.5, 0.1)
    assert growth.halted
    assert follow(growth, lambda step: 1.0) == {}
    assert not growth.finished  # patience ends a run, not this


def test_a_run_that_has_learnt_everything_lets_the_rate_fall_and_ends() -> None:
    growth = state()
    follow(growth, lambda step: 1.0 if step < 30 else 0.009, until=39)
    assert (growth.learnt, growth.rate_factor(), growth.end) == (None, 1.0, STEPS)
    factors = []
    while not growth.finished:
        growth.observe(0.009)
        factors.append(growth.rate_factor())
    assert (growth.learnt, growth.step) == (40, 60)
    assert factors == pytest.approx([k / 20 for k in range(20, -1, -1)])
    assert growth.rank == 8  # of 30 steps without progress


def test_a_state_survives_json_between_any_two_steps() -> None:
    def loss(step: int) -> float:
        return math.exp(-step / 3 / STEPS) if step < 60 else 1e-3

    whole = state()
    for cut in (1, 15, 16, 23, 65, 75):
        follow(whole, loss, until=cut)
        again = state()
        again.load_json(json.loads(json.dumps(whole.to_json())))
        assert again == whole
    assert whole.learnt is not None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"start_rank": 0, "max_rank": 4}, "start_rank 0 must lie between 1 and max_rank 4"),
        ({"start_rank": 5, "max_rank": 4}, "start_rank 5 must lie between 1 and max_rank 4"),
        ({"start_rank": 1, "max_rank": 4, "window": 0}, "at least one component trains, got a window of 0"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BudgetSettings(**given)
