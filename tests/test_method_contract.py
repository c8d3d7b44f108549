"""What an adapted layer promises: ``W0 x + bias + (alpha / r) B A x``, through all of a component's life."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_method_lowrank import nf4_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qaroma.method.adapter import AdaptedLinear, Adapter
from qaroma.method.aroma import GrowthController
from qaroma.method.dequantise import dense_weight
from qaroma.method.growth import GrowthSettings
from qaroma.method.lora import PlainLora

ALPHA = 3.0  # neither r nor 2 r
X = (5, 48)


def base_of(kind: str) -> nn.Module:
    if kind == "transposed":
        return Conv1D(32, 48).requires_grad_(False)
    return nn.Linear(48, 32).requires_grad_(False) if kind == "dense" else nf4_linear(48, 32, bias=True)


def promised(base: nn.Module, x: Tensor, components: list[tuple[Tensor, Tensor]], r: int) -> Tensor:
    """The sentence itself in fp64, from the fp32 parameters as they were trained: A (r, N), B (r, M)."""
    y = F.linear(x.double(), dense_weight(base, torch.float64), base.bias.double())
    for A, B in components:
        y = y + (ALPHA / r) * (x.double() @ A.double().T) @ B.double()
    return y


def trained(layer: AdaptedLinear) -> tuple[Tensor, Tensor]:
    """Give the active component a random B, as if it had trained; returns its fp32 A and B."""
    with torch.no_grad():
        layer.active_B.normal_()
    return layer.active_A.detach().clone(), layer.active_B.detach().clone()


@pytest.mark.parametrize("kind", ["dense", "nf4", "transposed"])
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("keep", [True, False])
def test_a_layer_computes_its_sentence_through_commit_restart_and_done(kind: str, r: int, keep: bool) -> None:
    base, x = base_of(kind), torch.randn(*X)
    adapter = Adapter(nn.Sequential(base), ["0"], inner_rank=r, alpha=ALPHA)
    layer = adapter.layers["0"]
    components: list[tuple[Tensor, Tensor]] = []

    def holds() -> None:
        torch.testing.assert_close(layer(x).double(), promised(base, x, components, r), rtol=1e-5, atol=1e-4)

    layer.start_component(adapter.initial_A(layer))
    holds()  # B is zero
    for _ in range(3):
        components.append(trained(layer))
        adapter.refresh()
        holds()
        layer.restart_component(adapter.initial_A(layer))
        holds()
    components.append(trained(layer))
    adapter.refresh()
    holds()
    layer.end(keep=keep)
    components = components if keep else components[:-1]
    holds()
    assert not layer.A[layer.rank :].any()  # blocks are filled up with zeros
    assert not layer.B[layer.rank :].any()
    A, B = adapter.factors()["0"]  # what is saved: the scale folded into B
    torch.testing.assert_close(B.T @ A, sum((ALPHA / r) * B_p.T @ A_p for A_p, B_p in components), rtol=1e-5, atol=1e-4)
    saved = Adapter(nn.Sequential(base), ["0"], inner_rank=r, alpha=99.0)  # another scale: it has no part in this
    saved.layers["0"].load_factors(A, B, adapter.components()["0"])
    torch.testing.assert_close(saved.layers["0"](x), layer(x))


def test_one_layer_is_placed_as_all_are_refreshed() -> None:
    adapter = Adapter(nn.Sequential(base_of("dense")), ["0"], inner_rank=2, alpha=ALPHA)
    layer = adapter.layers["0"]
    layer.start_component(adapter.initial_A(layer))
    trained(layer)
    layer.place_active()
    placed = [factor.clone() for factor in layer.factors()]
    adapter.refresh()
    assert all(torch.equal(one, other) for one, other in zip(placed, layer.factors(), strict=True))


@pytest.mark.parametrize("r", [1, 4])
def test_dropout_comes_before_the_active_A_and_in_training_alone(r: int) -> None:
    base, x = base_of("dense"), torch.randn(*X)
    adapter = Adapter(nn.Sequential(base), ["0"], inner_rank=r, alpha=ALPHA, dropout=0.5)
    layer = adapter.layers["0"].train()
    layer.start_component(adapter.initial_A(layer))
    components = []
    for _ in range(2):
        components.append(trained(layer))
        adapter.refresh()
        if len(components) == 1:
            layer.restart_component(adapter.initial_A(layer))
    (A, B), state = components[-1], torch.get_rng_state()
    y = layer(x)
    torch.set_rng_state(state)
    dropped = F.dropout(x, 0.5).double()
    expected = promised(base, x, components[:-1], r) + (ALPHA / r) * (dropped @ A.double().T) @ B.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.eval()(x).double(), promised(base, x, components, r), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("r", [1, 4])
def test_the_gradient_is_that_of_the_sentence(r: int) -> None:
    base, x, weights = base_of("nf4"), torch.randn(*X), torch.randn(5, 32)
    adapter = Adapter(nn.Sequential(base), ["0"], inner_rank=r, alpha=ALPHA)
    layer = adapter.layers["0"]
    layer.start_component(adapter.initial_A(layer))
    components = [trained(layer)]
    adapter.refresh()
    layer.restart_component(adapter.initial_A(layer))
    A, B = (t.double().requires_grad_() for t in trained(layer))
    adapter.refresh()
    (layer(x) * weights).sum().backward()
    (promised(base, x, [*components, (A, B)], r) * weights).sum().backward()
    torch.testing.assert_close(layer.active_A.grad.double(), A.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.active_B.grad.double(), B.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("method", ["aroma", "lora"])
def test_the_methods_keep_the_sentence_at_every_step(kind: str, r: int, method: str) -> None:
    """Here the components are those of the optimiser, collected before the step that may freeze them."""
    base, x, target = base_of(kind), torch.randn(*X), torch.randn(5, 32)
    model = nn.Sequential(base)
    adapter = Adapter(model, ["0"], inner_rank=r, alpha=ALPHA)
    layer = adapter.layers["0"]
    settings = GrowthSettings(t_in=3, check_every=1, warmup=0, restart_warmup=0, eps_out=0.0, max_rank=3 * r)
    controller = (
        GrowthController(adapter, settings, learning_rate=1e-2, total_steps=40)
        if method == "aroma"
        else PlainLora(adapter, learning_rate=1e-2, total_steps=9)
    )
    frozen: list[tuple[Tensor, Tensor]] = []
    grown: list[str] = []
    update = controller.trainer.update
    active: list[tuple[Tensor, Tensor]] = []

    def spied(*args: object) -> None:
        update(*args)
        active[:] = [(layer.active_A.detach().clone(), layer.active_B.detach().clone())]

    controller.trainer.update = spied
    for _ in range(9):
        ((model(x) - target) ** 2).mean().backward()
        events = controller.step()
        grown += [event.decision for event in events]
        if any(event.decision in ("commit", "keep") for event in events):
            frozen, active[:] = [*frozen, *active], []
        torch.testing.assert_close(model(x).double(), promised(base, x, [*frozen, *active], r), rtol=1e-5, atol=1e-5)
        if controller.finished:
            break
    assert grown == (["commit", "commit", "keep"] if method == "aroma" else [])
    assert all(B.count_nonzero() for _, B in [*frozen, *active])
    controller.finish()
    torch.testing.assert_close(model(x).double(), promised(base, x, [*frozen, *active], r), rtol=1e-5, atol=1e-5)
