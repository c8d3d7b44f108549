"""The growth state machine and the learning-rate schedule: numbers in, decisions out."""

from __future__ import annotations

import json
import math

import pytest

from qaroma.method.growth import GrowthSettings, GrowthState, Measurement
from qaroma.method.schedule import cosine, jagged_cosine


def settings(**changes) -> GrowthSettings:
    return GrowthSettings(
        **{"t_in": 40, "check_every": 10, "warmup": 10, "restart_warmup": 5, "eps_out": 0.01, **changes}
    )


def run(state: GrowthState, norms, beside=100.0, steps=200):
    """Drive the machine with ``norms(name, module) -> norm``; returns all events."""
    events = []
    for _ in range(steps):
        due = state.tick()
        events += state.observe({n: Measurement(norms(n, state.modules[n]), beside) for n in due})
        if state.finished:
            break
    return events


def test_first_check_after_the_warm_up_only_records_the_norm() -> None:
    state = GrowthState.start(["a"], settings(), 1)
    checks = [t for t in range(1, 31) if state.tick()]
    assert checks == [20, 30]  # 10 is the last step of the warm-up
    assert state.observe({"a": Measurement(2.0, 100.0)}) == []
    assert state.modules["a"].inner is None
    assert not state.modules["a"].converged


def test_inner_criterion_is_the_signed_relative_change_of_the_norm() -> None:
    state = GrowthState.start(["a"], settings(eps_in=0.1), 1)
    state.observe({"a": Measurement(2.0, 100.0)})
    assert state.observe({"a": Measurement(2.4, 100.0)}) == []
    assert state.modules["a"].inner == pytest.approx(0.2)
    (event,) = state.observe({"a": Measurement(1.2, 100.0)})  # a norm that falls has converged
    assert event.inner == pytest.approx(-0.5)
    assert event.outer == pytest.approx(0.012)
    assert event.decision == "commit"


def test_product_criterion_takes_the_norm_of_the_change() -> None:
    state = GrowthState.start(["a"], settings(inner_criterion="product", eps_in=0.1), 1)
    state.observe({"a": Measurement(2.0, 100.0)})
    assert state.observe({"a": Measurement(2.0, 100.0, change=0.4)}) == []  # same norm, other direction
    assert state.observe({"a": Measurement(4.0, 100.0, change=0.3)}) == []  # beside the norm before, not the new one
    assert state.modules["a"].inner == pytest.approx(0.15)
    (event,) = state.observe({"a": Measurement(4.0, 100.0, change=0.2)})
    assert event.inner == pytest.approx(0.05)


def test_lockstep_waits_for_the_slowest_and_converged_stays_converged() -> None:
    state = GrowthState.start(["fast", "slow"], settings(), 1)
    events = run(state, lambda name, m: 5.0 if name == "fast" else float(m.age**3), steps=40)
    assert [(e.step, e.module, e.decision) for e in events] == [(40, "fast", "commit"), (40, "slow", "commit")]
    assert state.modules["fast"].component == 2
    assert state.modules["fast"].age == 0


def test_a_module_that_converged_stays_converged_though_its_norm_grows_again() -> None:
    state = GrowthState.start(["early", "late"], settings(), 1)
    norms = {"early": [1.0, 1.0, 9.0], "late": [1.0, 5.0, 5.0]}  # late converges at the third check
    for early, late in zip(*norms.values(), strict=True):
        events = state.observe({"early": Measurement(early, 1e2), "late": Measurement(late, 1e2)})
    assert [(e.module, e.inner, e.decision) for e in events] == [("early", 8.0, "commit"), ("late", 0.0, "commit")]


@pytest.mark.parametrize(("outer", "decision"), [(0.01, "commit"), (0.01 - 1e-12, "done")])
def test_a_component_of_exactly_eps_out_is_not_small(outer: float, decision: str) -> None:
    state = GrowthState.start(["a"], settings(eps_out=0.01), 1)
    state.observe({"a": Measurement(outer, 1.0)})
    (event,) = state.observe({"a": Measurement(outer, 1.0)})
    assert (event.outer, event.decision) == (outer, decision)


@pytest.mark.parametrize(("now", "converged"), [(1.125, False), (1.125 - 1e-12, True)])
def test_a_change_of_exactly_eps_in_is_no_convergence(now: float, converged: bool) -> None:
    state = GrowthState.start(["a"], settings(eps_in=0.125), 1)
    state.observe({"a": Measurement(1.0, 1e2)})
    assert bool(state.observe({"a": Measurement(now, 1e2)})) == converged


def test_independent_modules_advance_alone() -> None:
    state = GrowthState.start(["fast", "slow"], settings(schedule="independent"), 1)
    events = run(state, lambda name, m: 5.0 if name == "fast" else float(m.age**3), steps=45)
    assert [(e.step, e.module) for e in events] == [(30, "fast"), (40, "slow")]
    # A new component has the restart warm-up of 5, so 30 + 10 records and 30 + 20 decides.
    assert (state.modules["fast"].age, state.modules["slow"].age) == (15, 5)


def test_outer_criterion_ends_a_module_and_the_run() -> None:
    state = GrowthState.start(["a", "b"], settings(), 1)
    events = run(state, lambda name, m: 5.0 if m.component < (2 if name == "a" else 4) else 0.5)
    done = {e.module: e for e in events if e.decision == "done"}
    assert state.finished
    assert {name: e.component for name, e in done.items()} == {"a": 2, "b": 4}
    assert {name: m.frozen_rank for name, m in state.modules.items()} == {"a": 1, "b": 3}
    assert all(e.outer < 0.01 for e in done.values())


@pytest.mark.parametrize(("mode", "decision", "rank"), [("discard", "done", 0), ("keep", "keep", 2)])
def test_what_becomes_of_the_last_component(mode: str, decision: str, rank: int) -> None:
    state = GrowthState.start(["a"], settings(on_converged=mode), inner_rank=2)
    (event,) = run(state, lambda name, m: 0.5)
    assert event.decision == decision
    assert state.modules["a"].frozen_rank == rank


def test_the_first_component_can_be_left_unchecked() -> None:
    state = GrowthState.start(["a"], settings(check_first=False), 1)
    events = run(state, lambda name, m: 0.5)
    assert [e.decision for e in events] == ["commit", "done"]


def test_max_rank_keeps_the_component_that_fills_it() -> None:
    state = GrowthState.start(["a"], settings(max_rank=6), inner_rank=2)
    events = run(state, lambda name, m: 5.0)
    assert [e.decision for e in events] == ["commit", "commit", "keep"]
    assert state.modules["a"].frozen_rank == 6


def test_t_in_ends_an_inner_loop_that_does_not_converge() -> None:
    state = GrowthState.start(["a"], settings(), 1)
    events = run(state, lambda name, m: float(2**m.age), steps=81)
    assert [e.step for e in events] == [40, 80]


def test_at_the_step_budget_every_active_component_is_kept() -> None:
    state = GrowthState.start(["a", "b"], settings(), 1)
    state.tick()
    state.modules["b"].age = 0  # began with the last step, as it may where patience ends a run
    assert [e.decision for e in state.finish()] == ["keep", "done"]
    assert state.finished
    assert [m.frozen_rank for m in state.modules.values()] == [1, 0]


def test_a_layer_that_no_token_reached_is_done() -> None:
    state = GrowthState.start(["a"], settings(), 1)
    (event,) = run(state, lambda name, m: 0.0)
    assert (event.inner, event.outer, event.decision) == (0.0, 0.0, "done")


def test_state_survives_json_exactly() -> None:
    state = GrowthState.start(["a", "b"], settings(), 1)
    run(state, lambda name, m: math.pi * m.age, steps=33)
    other = GrowthState.start(["a", "b"], settings(), 1)
    other.load_json(json.loads(json.dumps(state.to_json())))
    assert other == state


@pytest.mark.parametrize("change", [{"t_in": 5}, {"check_every": 0}, {"restart_warmup": 40}])
def test_settings_that_contradict_each_other_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="t_in"):
        settings(**change)


def test_jagged_cosine_by_hand() -> None:
    shape = {"total": 110, "warmup": 10, "restart_warmup": 5, "min_ratio": 0.1}
    first = [jagged_cosine(t, t, first=True, **shape) for t in range(110)]
    assert first[:11] == pytest.approx([0.1 * (t + 1) for t in range(10)] + [1.0])
    assert first[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert cosine(110, total=110, warmup=10, min_ratio=0.1) == pytest.approx(0.1)
    # A component reinitialised after 60 steps climbs from 0 back to the cosine, and follows it.
    again = [jagged_cosine(60 + age, age, first=False, **shape) for age in range(10)]
    assert again[:5] == pytest.approx([first[60 + age] * (age + 1) / 5 for age in range(5)])
    assert again[5:] == first[65:70]


def test_fixed_loops_last_t_in_steps_however_still_the_norm_stands() -> None:
    state = GrowthState.start(["a"], settings(inner_criterion="fixed", t_in=40), 1)
    events = run(state, lambda name, module: 5.0, steps=120)
    assert [(e.step, e.inner, e.outer, e.decision) for e in events] == [
        (step, None, pytest.approx(0.05), "commit") for step in (40, 80, 120)
    ]
