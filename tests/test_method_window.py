"""``growth.window``: which components train, against torch's AdamW, one parameter group a component."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.method.adapter import Adapter
from qaroma.method.aroma import GrowthController
from qaroma.method.growth import GrowthSettings

T_IN, STEPS = 4, 14


def controller(window: int | None, *, sizes: tuple[tuple[int, int], ...] = ((24, 16), (16, 12)), **changes):
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    adapter = Adapter(model, [str(i) for i in range(len(sizes))], alpha=2.0, seed=1)
    defaults = {"t_in": T_IN, "check_every": 2, "warmup": 2, "restart_warmup": 1, "eps_in": -1e9, "eps_out": 0.0}
    settings = GrowthSettings(**{**defaults, **changes, "window": window})
    return GrowthController(adapter, settings, learning_rate=1e-2, total_steps=60)


def backward(method: GrowthController, x: Tensor) -> None:
    (method.adapter.model(x) ** 2).mean().backward()


def train(method: GrowthController, count: int, *, seed: int = 0) -> list:
    generator, events = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        backward(method, torch.randn(8, method.adapter.layers["0"].in_features, generator=generator))
        events += method.step()
    return events


@pytest.mark.parametrize("window", [1, 2, 3, None])
def test_a_windows_newest_components_train_and_the_others_are_frozen(window: int | None) -> None:
    method = controller(window)
    train(method, STEPS)  # three components are committed, a fourth trains
    for layer in method.adapter.layers.values():
        training = min(4, window or 4)
        assert layer.active_components == [1] * training
        assert layer.components == [1] * (4 - training)
    before = {name: [f.clone() for f in layer.factors()] for name, layer in method.adapter.layers.items()}
    train(method, 1, seed=7)
    for name, layer in method.adapter.layers.items():
        for old, new in zip(before[name], layer.factors(), strict=True):
            moved = (old != new).any(dim=1).tolist()
            assert moved == [False] * layer.frozen_rank + [True] * layer.active_rank


@pytest.mark.parametrize("window", [2, None])
def test_beginning_a_component_moves_no_number_and_changes_no_output(window: int | None) -> None:
    method, x = controller(window), torch.randn(5, 24)
    for _ in range(5):
        train(method, T_IN - 1)
        generator = torch.Generator().manual_seed(0)
        backward(method, torch.randn(8, 24, generator=generator))
        rates, optimiser = method.learning_rates(), method.trainer.optimiser
        optimiser.clip(1.0)
        optimiser.step({**rates, "(head)": [0.0]})
        optimiser.zero_grad()
        method.adapter.refresh()
        output = method.adapter.model(x)
        method.trainer.begin({"0": 1, "1": 1}, window=window, reset="prune")
        assert torch.equal(method.adapter.model(x), output)
        for module in method.growth.modules.values():
            module.age = 0
            module.component += 1


def test_every_component_has_the_adamw_of_its_own_age() -> None:
    method = controller(None, sizes=((24, 16),))
    layer = method.adapter.layers["0"]
    own: list[tuple[nn.Parameter, nn.Parameter, torch.optim.AdamW]] = []

    def begin() -> None:
        A, B = (nn.Parameter(p.detach()[-1:].clone()) for p in (layer.active_A, layer.active_B))
        own.append((A, B, torch.optim.AdamW([A, B], weight_decay=0.0)))

    begin()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3 * T_IN + 2):
        x = torch.randn(8, 24, generator=generator)
        update = sum(layer.scale * B.T @ A for A, B, _ in own)
        (F.linear(x, layer.base.weight + update, layer.base.bias) ** 2).mean().backward()
        norm = torch.cat([p.grad.reshape(-1) for A, B, _ in own for p in (A, B)]).norm()
        for (A, B, optimiser), rate in zip(own, method.learning_rates()["0"], strict=True):
            for p in (A, B):
                p.grad.mul_((1.0 / (norm + 1e-6)).clamp_max(1.0))
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        backward(method, x)
        if method.step():
            begin()
        for row, (A, B, _) in enumerate(own):
            torch.testing.assert_close(layer.active_A[row : row + 1], A, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(layer.active_B[row : row + 1], B, rtol=1e-4, atol=1e-6)
    assert [len(own), method.trainer.optimiser.steps["0"]] == [4, [14, 10, 6, 2]]


@pytest.mark.parametrize("window", [2, None])
@pytest.mark.parametrize("cut", [3, 9])
def test_going_on_from_a_state_is_going_on(window: int | None, cut: int) -> None:
    whole, half, rest = (controller(window) for _ in range(3))
    train(whole, cut)
    train(half, cut)
    rest.load_state(half.state())
    for method in (whole, rest):
        train(method, 8, seed=11)
    assert whole.growth.to_json() == rest.growth.to_json()
    for name, layer in whole.adapter.layers.items():
        for ours, theirs in zip(layer.factors(), rest.adapter.layers[name].factors(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window", [2, None])
def test_a_module_that_is_done_keeps_what_it_has(window: int | None) -> None:
    method = controller(window, eps_out=1e9, check_first=False)
    events = train(method, 2 * T_IN)
    assert [e.decision for e in events] == ["commit", "commit", "keep", "keep"]
    assert method.finished
    assert all(layer.components == [1, 1] and not layer.active_rank for layer in method.adapter.layers.values())


@pytest.mark.parametrize("window", [2, 3, None])
def test_eq_6_weighs_the_newest_component_against_the_weight_with_all_others(window: int | None) -> None:
    method = controller(window)
    train(method, STEPS)
    measured = method._measure(["0", "1"])
    for name, layer in method.adapter.layers.items():
        A, B = (factor.double() for factor in layer.factors())
        own, earlier = B[-1:].T @ A[-1:], B[:-1].T @ A[:-1]
        assert measured[name].norm == pytest.approx(own.norm().item(), rel=1e-6)
        assert measured[name].beside == pytest.approx((layer.base.weight.double() + earlier).norm().item(), rel=1e-6)


def test_a_gradient_chooses_where_the_newest_component_begins_and_leaves_the_others() -> None:
    method = controller(None, init="gradient")
    x = torch.randn(16, 24)
    while method.probing:
        backward(method, x)
        method.probe()
    train(method, T_IN)
    before = {name: [f[:-1].clone() for f in layer.factors()] for name, layer in method.adapter.layers.items()}
    while method.probing:
        backward(method, x)
        method.probe()
    for name, layer in method.adapter.layers.items():
        assert all(torch.equal(old, new[:-1]) for old, new in zip(before[name], layer.factors(), strict=True))
        assert layer.active_B[-1].count_nonzero() == 0
        assert layer.active_A[-1].norm().item() == pytest.approx(3**-0.5, rel=1e-5)


def test_a_window_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one component trains, got a window of 0"):
        GrowthSettings(t_in=4, warmup=1, restart_warmup=1, window=0)
