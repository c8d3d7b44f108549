"""The method's options beside the paper's: outer criterion, no criteria, gradient init, reset, schedule, keep."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.method.adapter import Adapter, kaiming_A
from qaroma.method.aroma import GrowthController
from qaroma.method.base import MethodState
from qaroma.method.growth import GrowthSettings
from qaroma.method.probe import ROW_NORM, leading_directions


def controller(*sizes: tuple[int, int], inner_rank: int = 1, seed: int = 0, steps: int = 60, **changes):
    """A controller on a chain of linear layers; ``sizes`` are (in, out)."""
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    adapter = Adapter(model, [str(i) for i in range(len(sizes))], inner_rank=inner_rank, alpha=2.0, seed=seed)
    defaults = {"t_in": 6, "check_every": 2, "warmup": 1, "restart_warmup": 1, "eps_in": -1e9, "eps_out": 1e-9}
    settings = GrowthSettings(**{**defaults, **changes})
    return GrowthController(adapter, settings, learning_rate=1e-2, total_steps=steps)


def random_steps(method: GrowthController, count: int) -> list:
    events = []
    for _ in range(count):
        method.trainer.optimiser.gradients.normal_()
        events += method.step()
    return events


def dense(A: Tensor, B: Tensor) -> Tensor:
    return B.double().T @ A.double()


# Outer criterion "update".


@pytest.mark.parametrize("inner_rank", [1, 3])
def test_outer_criterion_update_equals_its_dense_twin(inner_rank: int) -> None:
    method = controller((48, 32), inner_rank=inner_rank, outer_criterion="update")
    layer = method.adapter.layers["0"]
    earlier = torch.zeros(32, 48, dtype=torch.float64)
    for component in range(1, 6):
        (event,) = random_steps(method, 6)
        rows = slice((component - 1) * inner_rank, component * inner_rank)
        own = dense(layer.A[rows], layer.B[rows])  # committing moves no number
        if component == 1:
            assert event.outer is None
        else:
            assert event.outer == pytest.approx((own.norm() / earlier.norm()).item(), rel=1e-9)
        earlier = earlier + own
    json.loads(json.dumps(event.to_json(), allow_nan=False))


def test_update_criterion_counts_what_an_adapter_brought() -> None:
    adapter = Adapter(nn.Sequential(nn.Linear(48, 32)), ["0"])
    adapter.layers["0"].load_factors(torch.randn(3, 48), torch.randn(3, 32), [3])
    before = dense(*adapter.layers["0"].frozen_factors())
    settings = GrowthSettings(t_in=4, warmup=1, restart_warmup=1, eps_out=1e-9, outer_criterion="update")
    (event,) = random_steps(GrowthController(adapter, settings, learning_rate=1e-2, total_steps=9), 4)
    layer = adapter.layers["0"]
    assert event.outer == pytest.approx((dense(layer.A[3:4], layer.B[3:4]).norm() / before.norm()).item(), rel=1e-6)


def test_update_criterion_ends_a_module_whose_component_is_small_beside_its_update() -> None:
    method = controller((48, 32), (32, 16), outer_criterion="update", eps_out=0.1)
    random_steps(method, 6)
    for _ in range(6):
        method.trainer.optimiser.gradients.normal_()
        method.trainer.optimiser.gradients[method.trainer.optimiser.slices["1"]] = 0  # the second stands still
        method.trainer.optimiser.first_moment[method.trainer.optimiser.slices["1"]] = 0
        events = method.step()
    assert [(e.module, e.component, e.decision) for e in events] == [("0", 2, "commit"), ("1", 2, "done")]


def test_update_criterion_ignores_the_scale_of_all_components() -> None:
    """Ten times every component's size, as ten times the learning rate makes it: the same ratio."""
    method = controller((48, 32), outer_criterion="update")
    random_steps(method, 20)
    layer = method.adapter.layers["0"]
    first = method._measure(["0"])["0"]
    layer.B.mul_(10)
    second = method._measure(["0"])["0"]
    assert second.norm == pytest.approx(10 * first.norm)
    assert second.norm / second.beside == pytest.approx(first.norm / first.beside)


@pytest.mark.parametrize("outer_criterion", ["weight", "update"])
def test_a_first_component_of_no_size_ends_its_module(outer_criterion: str) -> None:
    method = controller((48, 32), outer_criterion=outer_criterion)
    events = [event for _ in range(6) for event in method.step()]  # no gradient ever
    assert [(e.outer, e.decision) for e in events] == [(0.0, "done")]
    assert method.finished


# Without criteria: ReLoRA.


def test_without_criteria_every_component_commits_after_t_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    method = controller((48, 32), (32, 16), criteria=False, eps_in=1e9, eps_out=1e9)
    monkeypatch.setattr(method, "_measure", None)  # nothing may be measured
    events = random_steps(method, 60)
    assert method.name == "relora"
    assert [(e.step, e.module) for e in events] == [(6 * n, name) for n in range(1, 10) for name in ("0", "1")]
    assert {(e.inner, e.outer, e.decision) for e in events} == {(None, None, "commit")}
    assert not method.finished  # and none at step 60, after which nothing would train
    assert [e.decision for e in method.finish()] == ["keep", "keep"]
    assert method.ranks() == {"0": 10, "1": 10}


def test_without_criteria_max_rank_still_holds() -> None:
    method = controller((48, 32), criteria=False, max_rank=3)
    assert [e.decision for e in random_steps(method, 18)] == ["commit", "commit", "keep"]
    assert method.finished


# Gradient init.


def regression(in_features: int, out_features: int, rank: int, noise: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Inputs and targets whose loss gradient has ``rank`` large singular values, each half the one before."""
    x = torch.linalg.qr(torch.randn(4 * in_features, in_features))[0]
    left = torch.linalg.qr(torch.randn(out_features, rank))[0]
    right = torch.linalg.qr(torch.randn(in_features, rank))[0]
    W = (left * 0.5 ** torch.arange(rank)) @ right.T + noise * torch.randn(out_features, in_features)
    return x, x @ W.T


def backward(method: GrowthController, x: Tensor, y: Tensor, parts: int = 1) -> None:
    for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
        F.mse_loss(method.adapter.model(x_part), y_part, reduction="sum").backward()


def probe(method: GrowthController, x: Tensor, y: Tensor, parts: int = 1) -> int:
    passes = 0
    while method.probing:
        backward(method, x, y, parts)
        method.probe()
        passes += 1
    return passes


def true_directions(method: GrowthController, x: Tensor, y: Tensor, rank: int) -> Tensor:
    """Top right singular vectors of the dense gradient with respect to the weight, in fp64."""
    layer = method.adapter.layers["0"]
    W = layer.base.weight.detach().double() + dense(*layer.factors())
    W.requires_grad_()
    F.mse_loss(F.linear(x.double(), W, layer.base.bias.double()), y.double(), reduction="sum").backward()
    return torch.linalg.svd(W.grad).Vh[:rank]


@pytest.mark.parametrize("inner_rank", [1, 3])
def test_a_component_begins_along_the_gradients_leading_directions(inner_rank: int) -> None:
    x, y = regression(40, 24, inner_rank)
    method = controller((40, 24), inner_rank=inner_rank, init="gradient")
    layer = method.adapter.layers["0"]
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.base.bias.zero_()
    before = layer(x).detach()
    truth = true_directions(method, x, y, inner_rank)
    assert probe(method, x, y, parts=4) == 2
    A = layer.active_A.detach().double()
    assert torch.allclose(A @ A.T, ROW_NORM**2 * torch.eye(inner_rank, dtype=torch.float64), atol=1e-6)
    cosines = (A / ROW_NORM * truth).sum(1).abs()
    assert (cosines > 0.995).all(), cosines  # row by row, the largest first
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.A[:inner_rank], layer.active_A)
    assert layer.active_B.count_nonzero() == 0
    assert method.trainer.optimiser.gradients.count_nonzero() == 0


def test_a_direction_is_as_long_as_a_random_row_is_on_average() -> None:
    rows = kaiming_A(64, 512, torch.Generator().manual_seed(0))
    assert rows.norm(dim=1).mean().item() == pytest.approx(ROW_NORM, rel=0.01)


def test_later_components_are_probed_and_the_output_stays() -> None:
    x, y = regression(40, 24, 4, noise=0.0)
    method = controller((40, 24), init="gradient")
    layer = method.adapter.layers["0"]
    with torch.no_grad():
        layer.base.weight.zero_()
    events = []
    while not events:
        probe(method, x, y)
        backward(method, x, y)
        events = method.step()
    assert events[0].decision == "commit"
    before, truth = layer(x).detach(), true_directions(method, x, y, 1)
    moments = [b.clone() for n, b in method.trainer.optimiser.buffers().items() if n != "values"]
    assert probe(method, x, y) == 2
    assert torch.equal(layer(x), before)
    cosine = (layer.active_A.detach().double() / ROW_NORM * truth).sum().abs()
    assert cosine > 0.9
    after = [b for n, b in method.trainer.optimiser.buffers().items() if n != "values"]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_a_probe_leaves_other_modules_alone() -> None:
    method = controller((40, 24), (24, 8), init="gradient", schedule="independent")
    x, y = torch.randn(50, 40), torch.randn(50, 8)
    probe(method, x, y)
    for _ in range(3):
        backward(method, x, y)
        method.step()
    method._carry_out([])
    method._begun(["1"])  # as if the second had committed
    layers = method.adapter.layers
    with torch.no_grad():
        layers["1"].restart_component(method.adapter.initial_A(layers["1"]))
    kept = [layers["0"].active_A.clone(), layers["0"].active_B.clone(), layers["0"].A.clone(), layers["0"].B.clone()]
    fresh = layers["1"].active_A.clone()
    assert probe(method, x, y) == 2
    now = [layers["0"].active_A, layers["0"].active_B, layers["0"].A, layers["0"].B]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert not torch.equal(layers["1"].active_A, fresh)


def test_a_layer_without_gradient_keeps_its_random_start() -> None:
    method = controller((40, 24), (24, 8), init="gradient")
    drawn = {name: layer.active_A.clone() for name, layer in method.adapter.layers.items()}
    x, y = torch.zeros(5, 40), torch.randn(5, 8)  # nothing enters the first layer
    probe(method, x, y)
    layers = method.adapter.layers
    assert torch.equal(layers["0"].active_A, drawn["0"])
    assert not torch.equal(layers["1"].active_A, drawn["1"])
    assert all(layer.active_B.count_nonzero() == 0 for layer in layers.values())


def test_gradients_that_are_not_finite_choose_nothing() -> None:
    method = controller((40, 24), inner_rank=2, init="gradient")
    drawn = method.adapter.layers["0"].active_A.clone()
    for value in (torch.nan, torch.inf):
        method.trainer.optimiser.gradients.fill_(value)
        method.probe()
    assert torch.equal(method.adapter.layers["0"].active_A, drawn)


def test_gradient_init_is_deterministic_and_asks_before_a_step() -> None:
    x, y = torch.randn(50, 40), torch.randn(50, 8)
    methods = [controller((40, 24), (24, 8), inner_rank=2, init="gradient") for _ in range(2)]
    for method in methods:
        with pytest.raises(RuntimeError, match=r"call probe\(\)"):
            method.step()
        probe(method, x, y)
    for name, layer in methods[0].adapter.layers.items():
        assert torch.equal(layer.active_A, methods[1].adapter.layers[name].active_A)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_checkpoint_goes_on_with_the_probe_or_without_it(passes: int) -> None:
    x, y = torch.randn(50, 40), torch.randn(50, 24)
    method, other = (controller((40, 24), inner_rank=2, init="gradient") for _ in range(2))
    for _ in range(passes):
        backward(method, x, y)
        method.probe()
    other.load_state(method.state())
    assert method.probing == other.probing == (passes < 2)
    for each in (method, other):
        probe(each, x, y)
        backward(each, x, y)
        each.step()
    layers = [each.adapter.layers["0"] for each in (method, other)]
    assert torch.equal(layers[0].active_A, layers[1].active_A)
    assert torch.equal(layers[0].active_B, layers[1].active_B)


@pytest.mark.parametrize("shape", [(1, 30), (4, 30), (5, 3)])
def test_leading_directions_equal_a_plain_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) * 1e-12
    found, k = leading_directions(matrix, torch.randn(shape)), min(shape)
    truth = torch.linalg.svd(matrix.double(), full_matrices=False).Vh
    assert torch.allclose((found[:k].double() @ truth[:k].T).abs(), torch.eye(k, dtype=torch.float64), atol=1e-5)
    assert found[k:].count_nonzero() == 0


def test_directions_that_a_gradient_does_not_have_are_random_and_orthonormal() -> None:
    matrix, fill = torch.zeros(3, 20), torch.randn(3, 20)
    matrix[:] = torch.randn(20)  # rank one
    found = leading_directions(matrix, fill)
    assert torch.allclose(found @ found.T, torch.eye(3), atol=1e-5)
    assert (F.normalize(matrix[0], dim=0) @ found[0]).abs() > 1 - 1e-6
    span = torch.linalg.qr(torch.cat([matrix[:1], fill]).T)[0]
    assert torch.allclose(span @ (span.T @ found.T), found.T, atol=1e-4)


# Reset, schedule and the last component, at the controller.


@pytest.mark.parametrize(("mode", "share", "steps"), [("full", 0.0, 0), ("none", 1.0, 6), ("prune", 0.001, 6)])
def test_what_a_reset_leaves_of_the_moments(mode: str, share: float, steps: int) -> None:
    method = controller((3000, 2000), (2000, 2000), reset=mode, schedule="independent")
    method.growth.modules["1"].age = -2  # the second is two steps behind, so only the first is reset
    random_steps(method, 5)
    method.trainer.optimiser.gradients.normal_()
    (event,) = method.step()
    optimiser = method.trainer.optimiser
    assert event.module == "0"
    for moment in (optimiser.first_moment, optimiser.second_moment):
        kept = moment[optimiser.slices["0"]].count_nonzero().item() / 5000
        assert kept == pytest.approx(share, abs=0.002)
        assert moment[optimiser.slices["1"]].count_nonzero() == 4000
    assert optimiser.steps == {"0": [steps], "1": [6]}
    kept = [(m[optimiser.slices["0"]] != 0) for m in (optimiser.first_moment, optimiser.second_moment)]
    assert torch.equal(*kept)  # the same elements of both


def test_after_a_full_reset_a_component_trains_as_a_first_one_does() -> None:
    """Equal gradients give equal first updates: nothing of the last component is left, step count too."""
    method = controller((48, 32), reset="full", restart_warmup=1, warmup=1, steps=10**9)
    layer = method.adapter.layers["0"]
    gradients = torch.randn(6, method.trainer.optimiser.gradients.numel())
    moved = []
    for _ in range(2):
        before = method.trainer.optimiser.values.clone()
        for row in gradients[:5]:
            method.trainer.optimiser.gradients.copy_(row)
            method.step()
        moved.append(method.trainer.optimiser.values - before)
        method.trainer.optimiser.gradients.copy_(gradients[5])
        method.step()
    assert layer.frozen_rank == 2
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-6)


def test_independent_modules_grow_and_end_alone() -> None:
    method = controller((48, 32), (32, 16), schedule="independent", eps_in=1e9, outer_criterion="update")
    method.growth.modules["1"].age = -3
    events = random_steps(method, 20)
    times = {name: [e.step for e in events if e.module == name] for name in ("0", "1")}
    assert times == {"0": [4, 8, 12, 16, 20], "1": [7, 11, 15, 19]}
    assert method.ranks() == {"0": 6, "1": 5}


@pytest.mark.parametrize(("mode", "rank"), [("keep", 2), ("discard", 0)])
def test_what_becomes_of_the_last_components_factors(mode: str, rank: int) -> None:
    method = controller((48, 32), inner_rank=2, on_converged=mode, eps_out=1e9)
    layer, x = method.adapter.layers["0"], torch.randn(7, 48)
    random_steps(method, 5)
    method.trainer.optimiser.gradients.zero_()
    method.trainer.optimiser.first_moment.zero_()  # the last update moves nothing
    trained, base = layer(x).detach(), layer.base(x)
    (event,) = method.step()
    assert event.decision == ("keep" if mode == "keep" else "done")
    assert (layer.rank, method.trainable_parameters(), method.finished) == (rank, 0, True)
    assert torch.allclose(layer(x), trained if mode == "keep" else base, atol=1e-6)
    assert not torch.allclose(trained, base, atol=1e-3)


# Checkpoints.


@pytest.mark.parametrize("at", [3, 6, 9, 21])
def test_a_restored_controller_goes_on_bit_for_bit(at: int) -> None:
    """With all that a controller carries along: norms, last factors, moments, counts, random values to come."""
    options = {"inner_rank": 2, "inner_criterion": "product", "check_every": 2, "steps": 30}
    sizes = ((48, 32), (32, 16))

    def go_on(method: GrowthController, start: int, end: int = 30) -> list:
        events = []
        for step in range(start, end):
            gradients = method.trainer.optimiser.gradients
            gradients.copy_(torch.randn(gradients.shape, generator=torch.Generator().manual_seed(step)))
            events += method.step()
        return events

    method, restored = controller(*sizes, **options), controller(*sizes, seed=1, **options)
    go_on(method, 0, at)
    state = method.state()
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    restored.load_state(MethodState(tensors, json.loads(json.dumps(state.values))))
    x = torch.randn(5, 48)
    assert torch.equal(restored.adapter.model(x), method.adapter.model(x))
    events = go_on(method, at)
    assert events
    assert go_on(restored, at) == events
    assert torch.equal(restored.adapter.model(x), method.adapter.model(x))


def test_a_new_component_has_no_factors_to_be_compared_with() -> None:
    method = controller((48, 32), inner_criterion="product")
    random_steps(method, 4)
    assert any(name.startswith("previous.") for name in method.state().tensors)
    (event,) = random_steps(method, 2)
    assert event.decision == "commit"
    assert not any(name.startswith("previous.") for name in method.state().tensors)
