"""Training steps: levels, tiles, packed rows, and the offload with each of its waits taken out."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from phantom.card import Card
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.world import base, batch, gradients, growing, step, trained
from qaroma.engine import checkpointing, tiled
from qaroma.engine.levels import apply_level
from qaroma.model.attention import repeat_keys
from qaroma.training.loss_scale import LossScale

A_STEP = {"tolist in fit.accumulate": 1}
MLP = ["gate_proj", "up_proj", "down_proj"]


def _step_at(level: int) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        model, method = trained(level)
        card.clear()
        step(model, method, [batch(2, 64)] * 2)

    return run


def _kernels_a_layer(level: int) -> Callable[[Card], dict[str, int]]:
    """What one more layer adds to a step of one micro-batch."""

    def run(card: Card) -> dict[str, int]:
        kernels = []
        for depth in (2, 3):
            model, method = trained(level, sizes={"num_hidden_layers": depth})
            card.clear()
            step(model, method, [batch(1, 32)])
            kernels.append(card.kernels)
        return {"kernels a layer": kernels[1] - kernels[0]}

    return run


for _level, _kernels in ((0, 216), (1, 288), (2, 290), (3, 290)):
    SCENARIOS[f"a step at level {_level}"] = Scenario(_step_at(_level), waits=A_STEP)
    SCENARIOS[f"kernels at level {_level}"] = Scenario(_kernels_a_layer(_level), result={"kernels a layer": _kernels})


def _tiled(level: int, targets: Any) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        model, method = trained(level, targets=targets, sizes={"num_hidden_layers": 1})
        tiled.untile(model)
        tiled.tile_tokenwise(model, 16 * 128)
        card.clear()
        step(model, method, [batch(1, 40)])

    return run


SCENARIOS["tiles at level 2"] = Scenario(_tiled(2, "all-linear"), waits=A_STEP)
SCENARIOS["tiles at level 3, adapters on the MLP alone"] = Scenario(_tiled(3, MLP), waits=A_STEP)


@scenario("packed rows", waits=A_STEP)
def packed(card: Card) -> None:
    model, method = trained(1)
    card.clear()
    step(model, method, [batch(2, 64, lengths=(40, 24))])


@scenario("a step in fp16", waits=A_STEP)
def in_fp16(card: Card) -> None:
    model, method = trained(1, sizes={"dtype": torch.float16})
    card.clear()
    gradients(model, method, [batch(2, 64)] * 2, loss_scale=LossScale())
    method.step()


@scenario("attention in fp32 repeats grouped keys", waits=A_STEP)
def repeated(card: Card) -> None:
    """SDPA's math kernel, which makes L x L matrices, without that."""
    for repeats, taken in ((False, "math"), (True, "efficient")):
        model = base(1, torch.float32)
        if repeats:
            repeat_keys(model)
        method = growing(model)
        apply_level(model.train(), 1)
        card.clear()
        card.attention.clear()
        step(model, method, [batch(1, 64)])
        assert set(card.attention) == {taken}


_MUTANTS = {
    "copied out without a wait": ("stream.wait_stream(torch.cuda.current_stream(tensor.device))", "side stream reads"),
    "fetched before it is out": ("back.wait_stream(out)", "side stream reads"),
    "used before it is back": ("current.wait_stream(self.streams[1])", "default stream reads"),
    "given back while copied out": ("tensor.record_stream(stream)\n", "freed on the default stream"),
    "given back while in use": (
        "tensor.record_stream(torch.cuda.current_stream(self.device))",
        "freed on the side stream",
    ),
}


def _mutant(statement: str) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        text = inspect.getsource(checkpointing)
        assert text.count(statement) == 1
        mutant: Any = types.ModuleType("mutant")
        exec(compile(text.replace(statement, "pass\n"), checkpointing.__file__, "exec"), mutant.__dict__)
        model, method = trained(1)
        mutant.enable_checkpointing(model, offload=True)
        step(model, method, [batch(1, 32)])

    return run


for _name, (_statement, _fault) in _MUTANTS.items():
    SCENARIOS[f"mutant: {_name}"] = Scenario(_mutant(_statement), fault=_fault)
