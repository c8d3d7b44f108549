"""Growth with its options, states to the host and back, and the methods of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phantom.card import CARD, Card
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.world import as_saved, base, batch, gradients, on_host, step, trained
from qaroma.engine.levels import apply_level
from qaroma.method import peft_lora
from qaroma.method.attach import attach
from qaroma.method.budget import BudgetSettings
from qaroma.method.joint import JointController
from qaroma.method.spectrum import component_cosines, effective_rank
from qaroma.method.targets import find_targets

QUICK = {"t_in": 2, "warmup": 1, "restart_warmup": 1, "check_every": 1}
ONE_LAYER = {"num_hidden_layers": 1}
A_CHECK = "tolist in aroma._measure"


def _norms(beside: float) -> Callable[[Tensor], Any]:
    """What a check reads: the size of each component, of what stands beside it, and no change; all else is one."""

    def values(tensor: Tensor) -> Any:
        if tensor.dim() == 2 and tensor.shape[1] == 3:
            return [[1.0, beside, 1e-9]] * tensor.shape[0]
        return [1.0] * tensor.numel()

    return values


def _grows(**settings: Any) -> Callable[[Card], None]:
    """Components are committed, then every module ends, then the method is finished."""

    def run(card: Card) -> None:
        model, method = trained(1, sizes=ONE_LAYER, **QUICK, **settings)
        decided = []
        for beside in (1.0, 1e9):
            card.tolist = _norms(beside)
            events: list[Any] = []
            for _ in range(8):
                while method.probing:
                    gradients(model, method, [batch(1, 8)])
                    method.probe()
                card.clear()
                events = step(model, method, [batch(1, 8)])
                if events:
                    break
            decided.append({e.decision for e in events})
            assert card.waits[A_CHECK] == 1  # of all modules together
        assert decided in ([{"commit"}, {"done"}], [{"commit"}, {"keep"}])
        assert method.finished
        assert not method.finish()
        method.load_factors(on_host(method), method.components())

    return run


SCENARIOS["growth"] = Scenario(_grows())
SCENARIOS["growth by product and update, full reset"] = Scenario(
    _grows(inner_criterion="product", outer_criterion="update", reset="full"), slow=True
)
SCENARIOS["growth in a window of two"] = Scenario(_grows(window=2), slow=True)
SCENARIOS["growth from the gradient"] = Scenario(_grows(init="gradient"))


def _within_a_budget(card: Card) -> tuple[Any, JointController]:
    model = base(1, **ONE_LAYER)
    settings = BudgetSettings(start_rank=2, max_rank=8, warmup=2)
    method = JointController(attach(model), settings, learning_rate=1e-3, total_steps=64)
    apply_level(model, 1)
    card.tolist = lambda tensor: [1.0] * tensor.numel()
    return model.train(), method


@scenario("growth within a budget")
def budget(card: Card) -> None:
    """The default: the rate is measured, rank is added, the state goes to a file and back, every component is kept."""
    model, method = _within_a_budget(card)
    grown: list[Any] = []
    for _ in range(17):
        card.clear()
        events = step(model, method, [batch(1, 8)])
        grown += events
        measured = {"item in joint.step": 1} if 1 < method.growth.step <= 16 else {}
        allotted = {"tolist in joint._grow": 1} if events else {}
        assert card.waits == {"tolist in fit.accumulate": 1, **measured, **allotted}
        if events:
            break
    assert {e.decision for e in grown} == {"commit"}
    again, restored = _within_a_budget(card)
    restored.load_state(as_saved(method.state()))
    step(again, restored, [batch(1, 8)])
    assert {e.decision for e in restored.finish()} == {"keep"}
    restored.load_factors(on_host(restored), restored.components())


@scenario("a state to the host and back")
def state(card: Card) -> None:
    model, method = trained(2, sizes=ONE_LAYER, inner_criterion="product")
    step(model, method, [batch(1, 8)])
    again, restored = trained(2, sizes=ONE_LAYER, inner_criterion="product")
    restored.load_state(as_saved(method.state()))
    step(again, restored, [batch(1, 8)])
    assert {t.device for t in restored.trainer.optimiser.buffers().values()} == {CARD}


@scenario("every component is kept")
def kept(card: Card) -> None:
    model, method = trained(1, sizes=ONE_LAYER)
    step(model, method, [batch(1, 8)])
    card.clear()
    assert {e.decision for e in method.finish()} == {"keep"}
    assert not card.waits


@scenario("spectra")
def spectra(card: Card) -> None:
    A, B = (torch.randn(4, width, device=CARD) for width in (32, 64))
    component_cosines(A, B, [1, 1, 2])
    effective_rank(A, B)


def _peft(build: Callable[[Any, list[str]], Any]) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        model = base(1, **ONE_LAYER)
        method = build(model, find_targets(model))
        apply_level(model.train(), 1)
        card.tolist = lambda t: [True if t.dtype is torch.bool else 0] * t.shape[0]
        for _ in range(3):
            step(model, method, [batch(1, 8)])
        state, card.tolist = method.state(), None
        method.load_state(type(state)({n: t.cpu() for n, t in state.tensors.items()}, state.values))
        step(model, method, [batch(1, 8)])
        method.finish()

    return run


def _lora(model: Any, names: list[str]) -> peft_lora.PeftLora:
    tuner = peft_lora.inject_lora(model, names, rank=8, alpha=16)
    return peft_lora.PeftLora(tuner, learning_rate=1e-3, total_steps=20)


def _adalora(model: Any, names: list[str]) -> peft_lora.AdaLora:
    tuner = peft_lora.inject_adalora(model, names, rank=4, alpha=8, total_steps=8)
    return peft_lora.AdaLora(tuner, learning_rate=1e-3, total_steps=8)


SCENARIOS["peft-lora"] = Scenario(_peft(_lora))
SCENARIOS["adalora"] = Scenario(_peft(_adalora), slow=True)
