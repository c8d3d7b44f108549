"""Growth within a budget on a model: all components train together, and the rate is measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qaroma.method.adapter import Adapter
from qaroma.method.budget import BudgetSettings, allotted
from qaroma.method.joint import JointController

STEPS = 160  # a check every 8; the rate is measured over 40


def controller(*, sizes: tuple[tuple[int, int], ...] = ((24, 16), (16, 12)), **changes) -> JointController:
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    adapter = Adapter(model, [str(i) for i in range(len(sizes))], alpha=2.0, seed=1)
    settings = BudgetSettings(**{"start_rank": 2, "max_rank": 8, "warmup": 2, **changes})
    return JointController(adapter, settings, learning_rate=1e-2, total_steps=STEPS)


def train(method: JointController, until: int, *, loss: float | None = 1.0) -> list:
    """Up to a step; the loss that growth is told is one that does not fall."""
    events = []
    while method.growth.step < until:
        generator = torch.Generator().manual_seed(method.growth.step)
        # The last step's loss is still there when the next is computed, as in anybody's loop.
        mean_loss = (method.adapter.model(torch.randn(8, 24, generator=generator)) ** 2).mean()
        mean_loss.backward()
        events += method.step(loss)
    return events


def test_the_modules_that_pay_grow_and_no_output_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    method, x = controller(), torch.randn(5, 24)
    outputs: list[tuple[Tensor, Tensor]] = []
    begin = method.trainer.begin

    def watched(*args, **kwargs) -> None:
        before = method.adapter.model(x).detach()
        begin(*args, **kwargs)
        outputs.append((before, method.adapter.model(x).detach()))

    monkeypatch.setattr(method.trainer, "begin", watched)
    events = train(method, 30)
    assert {e.step for e in events} == {16, 24}
    assert all(e.decision == "commit" for e in events)
    assert len(outputs) == 2
    assert all(torch.equal(before, after) for before, after in outputs)
    grown = {name: 1 + sum(e.module == name for e in events) for name in method.adapter.layers}
    for name, layer in method.adapter.layers.items():
        assert (len(layer.active_components), layer.components) == (grown[name], [])
        assert layer.active_B.count_nonzero() == layer.active_B.numel()  # all of them train
    budget = 8 * sum(layer.in_features + layer.out_features for layer in method.adapter.layers.values())
    assert budget - 2 * 40 < method.trainable_parameters() <= budget  # what is left buys no component
    assert {e.module: (e.component, e.decision) for e in method.finish()} == {
        name: (count, "keep") for name, count in grown.items()
    }
    assert method.trainable_parameters() == 0


def test_rank_goes_to_the_half_that_pays_most_for_a_parameter() -> None:
    sizes = {"a": 10, "b": 10, "c": 20, "d": 20}
    assert allotted(4, {"a": 1.0, "b": -3.0, "c": 5.0, "d": 0.5}, sizes) == {"c": 8, "a": 8}
    assert allotted(4, {"a": -1.0, "b": -3.0, "c": -9.0, "d": -0.5}, sizes) == {"d": 8, "a": 8}  # the least loss
    assert allotted(1, {"a": 9.0, "b": 8.0, "c": 7.0, "d": 0.0}, sizes) == {"a": 2, "b": 2, "c": 1}


def test_credit_is_what_the_last_update_took_off_the_loss_module_by_module() -> None:
    method = controller(measured_rate=False)
    x = torch.randn(64, 24)
    for _ in range(3):
        (method.adapter.model(x) ** 2).mean().backward()
        optimiser = method.trainer.optimiser
        taken = [float((optimiser.gradients[part] * optimiser.last_update[part]).sum())
                 for part in optimiser.slices.values()]  # fmt: skip
        before = method._credit.clone()
        method.step(1.0)
        expected = 0.9 * before + torch.tensor(taken) if method.growth.step > 1 else before
        torch.testing.assert_close(method._credit, expected)
    assert (method._credit > 0).all()  # one batch again and again: every update takes something off


def test_a_window_freezes_the_oldest_components() -> None:
    method = controller(window=2)
    train(method, 30)
    frozen = {name: layer.components for name, layer in method.adapter.layers.items()}
    assert any(frozen.values())
    assert all(len(layer.active_components) <= 2 for layer in method.adapter.layers.values())


def test_with_a_window_of_one_a_larger_component_takes_the_place_of_the_first() -> None:
    method, x = controller(window=1), torch.randn(5, 24)
    train(method, 15)
    before = method.adapter.model(x)
    events = train(method, 16)
    grown = {event.module for event in events}
    assert grown
    assert all(len(layer.active_components) == 1 for layer in method.adapter.layers.values())
    for name in grown:
        assert method.adapter.layers[name].components == [2]
        assert method.adapter.layers[name].active_components[0] > 2
    assert not torch.equal(method.adapter.model(x), before)
    train(method, 40)
    method.finish()


def test_rates_fall_with_the_square_root_of_the_rank_after_a_warm_up_of_each_component() -> None:
    method = controller(measured_rate=False, min_lr_ratio=1.0, warmup=4)
    assert method.learning_rates()["0"] == pytest.approx([1e-2 / 4])
    (first, *_) = train(method, 16)
    settled = 1e-2 * math.sqrt(2 / 4)
    assert method.learning_rates()[first.module] == pytest.approx([settled, settled / 4])
    train(method, 20)
    assert method.learning_rates()[first.module] == pytest.approx([settled, settled])
    train(method, 60)
    assert all(
        rate == pytest.approx(1e-2 * math.sqrt(2 / 8)) for rates in method.learning_rates().values() for rate in rates
    )


def test_the_rate_is_measured_over_a_quarter_of_the_run_and_then_stays() -> None:
    method, optimiser = controller(), None
    optimiser = method.trainer.optimiser
    factors = [method.rate.factor]
    for step in range(1, 45):
        train(method, step)
        factors.append(method.rate.factor)
        assert (optimiser.last_update is not None) == (step < 40)
    assert len(set(factors[:40])) > 30
    assert len(set(factors[40:])) == 1


@pytest.mark.parametrize("window", [1, 2, None])
@pytest.mark.parametrize("cut", [5, 15, 16, 20, 39, 40, 41])  # measuring, at growth, between growths, measured
def test_going_on_from_a_state_is_going_on(cut: int, window: int | None) -> None:
    whole, half, rest = (controller(window=window) for _ in range(3))
    train(whole, 44)
    train(half, cut)
    rest.load_state(half.state())
    train(rest, 44)
    assert whole.growth.to_json() == rest.growth.to_json()
    assert whole.rate == rest.rate
    assert whole.learning_rates() == rest.learning_rates()
    for name, layer in whole.adapter.layers.items():
        other = rest.adapter.layers[name]
        assert (layer.components, layer.active_components) == (other.components, other.active_components)
        for ours, theirs in zip(layer.factors(), other.factors(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_run_that_memorises_ends_by_itself() -> None:
    method = controller(sizes=((24, 16),), start_rank=1)
    layer = method.adapter.layers["0"]
    x = torch.randn(32, 24)
    with torch.no_grad():
        wanted = layer.base(x) + x @ torch.randn(24, 1) @ torch.randn(1, 16) / 5
    rates = []
    for _ in range(STEPS):
        loss = (method.adapter.model(x) - wanted).square().mean()
        loss.backward()
        method.step(loss.item())
        rates.append(method.learning_rate)
        if method.finished:
            break
    assert (method.finished, method.ending) == (True, "learnt")
    assert len(rates) < STEPS
    assert rates[-1] < rates[-3] < rates[-6]


def test_validation_reaches_growth() -> None:
    method = controller()
    method.validated(1.0, 0.1)
    method.validated(1.3, 0.1)
    train(method, 30)
    assert method.ranks() == {"0": 2, "1": 2}


def test_a_step_without_its_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"follows the training loss: call step\(loss\)"):
        train(controller(), 1, loss=None)
