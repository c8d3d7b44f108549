"""Growth within a budget on a model: all components train together, and the rate is measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qaroma.method.adapter import Adapter
from qaroma.method.budget import BudgetSettings
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


def test_modules_grow_within_one_budget_and_the_output_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    method, x = controller(), torch.randn(5, 24)
    outputs: list[tuple[Tensor, Tensor]] = []
    begin = method.trainer.begin

    def watched(*args, **kwargs) -> None:
        before = method.adapter.model(x).detach()
        begin(*args, **kwargs)
        outputs.append((before, method.adapter.model(x).detach()))

    monkeypatch.setattr(method.trainer, "begin", watched)
    events = train(method, 30)
    grown = {(e.step, e.module, e.component) for e in events}
    assert grown == {(16, "1", 1), (24, "1", 2), (24, "0", 1)}  # what module 1's updates take off the loss is more
    assert {e.decision for e in events} == {"commit"}
    sizes = {name: layer.in_features + layer.out_features for name, layer in method.adapter.layers.items()}
    spent = sum(rank * sizes[name] for name, rank in method.ranks().items())
    assert 0 <= 8 * sum(sizes.values()) - spent < 2 * max(sizes.values())  # a mean rank of 2, 4, 8
    assert len(outputs) == 2
    assert all(torch.equal(before, after) for before, after in outputs)
    for layer in method.adapter.layers.values():
        assert layer.components == []
        assert layer.active_B.count_nonzero() == layer.active_B.numel()  # all of them train
    assert [(e.component, e.decision) for e in method.finish()] == [(2, "keep"), (3, "keep")]
    assert method.components() == {"0": [2, 1], "1": [2, 4, 8]}
    assert method.trainable_parameters() == 0


def test_a_window_freezes_the_oldest_components() -> None:
    method = controller(window=2)
    train(method, 30)
    layers = method.adapter.layers
    assert (layers["0"].components, layers["0"].active_components) == ([], [2, 1])
    assert (layers["1"].components, layers["1"].active_components) == ([2], [4, 8])


def test_rates_fall_with_the_square_root_of_the_rank_after_a_warm_up_of_each_component() -> None:
    method = controller(measured_rate=False, min_lr_ratio=1.0, warmup=4)
    assert method.learning_rates() == {"0": [1e-2 / 4], "1": [1e-2 / 4]}
    train(method, 16)
    settled = 1e-2 * math.sqrt(2 / 4)
    assert method.learning_rates()["0"] == pytest.approx([settled])
    assert method.learning_rates()["1"] == pytest.approx([settled, settled / 4])
    train(method, 20)
    assert method.learning_rates()["1"] == pytest.approx([settled, settled])
    train(method, 60)
    assert method.learning_rates()["1"] == pytest.approx([1e-2 * math.sqrt(2 / 8)] * 3)


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


@pytest.mark.parametrize("window", [2, None])
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
