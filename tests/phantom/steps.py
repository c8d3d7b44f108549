"""Training steps: levels, tiles, packed rows, and the offload with each of its waits taken out."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from phantom.card import CARD, Card, tensors_of
from phantom.known import KnownResults
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.world import base, batch, gradients, growing, step, trained
from qaroma.engine import checkpointing, placement, tiled
from qaroma.engine.levels import apply_level
from qaroma.model.attention import repeat_keys
from qaroma.model.documents import keep_documents_apart, one_kernel_for_all
from qaroma.training.loss_scale import LossScale

A_STEP = {"tolist in fit.accumulate": 1}
MLP = ["gate_proj", "up_proj", "down_proj"]


def _step_at(level: int) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        model, method = trained(level)
        card.clear()
        step(model, method, [batch(2, 64)] * 2)

    return run


def counts(card: Card) -> dict[str, int]:
    products = sum(n for name, n in card.ops.items() if name.startswith(("aten.mm.", "aten.addmm")))
    return {
        "kernels": card.kernels,
        "products": products,
        "weights unpacked": card.ops["bitsandbytes.dequantize_4bit.default"],
    }


def _a_layer(level: int) -> Callable[[Card], dict[str, int]]:
    """What one more layer adds to a step of one micro-batch."""

    def run(card: Card) -> dict[str, int]:
        found = []
        for depth in (2, 3):
            model, method = trained(level, sizes={"num_hidden_layers": depth})
            card.clear()
            step(model, method, [batch(1, 32)])
            found.append(counts(card))
        fewer, more = found
        return {name: more[name] - fewer[name] for name in more}

    return run


# A layer has seven weights: the forward and the backward pass unpack all of them, recomputation all but the last.
for _level, _kernels, _products, _unpacked in ((0, 171, 56, 14), (1, 224, 75, 20), (2, 226, 75, 20), (3, 226, 75, 20)):
    SCENARIOS[f"a step at level {_level}"] = Scenario(_step_at(_level), waits=A_STEP)
    SCENARIOS[f"kernels at level {_level}"] = Scenario(
        _a_layer(_level), result={"kernels": _kernels, "products": _products, "weights unpacked": _unpacked}
    )


def _tiled(level: int, targets: Any, memory: int = 8 << 30) -> Callable[[Card], dict[str, int]]:
    def run(card: Card) -> dict[str, int]:
        card.total = memory
        model, method = trained(level, targets=targets, sizes={"num_hidden_layers": 1})
        tiled.untile(model)
        tiled.tile_tokenwise(model, 16 * 128)
        card.clear()
        step(model, method, [batch(1, 40)])
        return counts(card)

    return run


# One layer, three tiles: attention unpacks nine weights (the first q, k and v have no gradient to give on), the MLP its
# three once a pass; on a full card for each tile, forward, forward again and backward.
SCENARIOS["tiles at level 2"] = Scenario(
    _tiled(2, "all-linear"), waits=A_STEP, result={"kernels": 479, "products": 139, "weights unpacked": 15}
)
SCENARIOS["tiles at level 2 on a full card"] = Scenario(
    _tiled(2, "all-linear", memory=2**16), result={"kernels": 542, "products": 139, "weights unpacked": 36}
)
SCENARIOS["tiles at level 3, adapters on the MLP alone"] = Scenario(_tiled(3, MLP), waits=A_STEP)


def _packed(prepare: Callable[[Any], None], dtype: torch.dtype) -> Callable[[Card], dict[str, int]]:
    """A step of two rows of three documents each: which attention ran, a layer and pass."""

    def run(card: Card) -> dict[str, int]:
        model, method = trained(1, sizes={"dtype": dtype})
        prepare(model)
        one_kernel_for_all(CARD, dtype, 32)  # asked once a process
        card.clear()
        step(model, method, [batch(2, 64, lengths=(40, 14, 10))])
        together = {name: card.ops[f"torch_attn.{name}.default"] for name in ("_varlen_attn", "_varlen_attn_backward")}
        return {"kernels": card.kernels, **{name: n for name, n in (card.attention | together).items() if n}}

    return run


_TOGETHER = {"_varlen_attn": 4, "_varlen_attn_backward": 2}
# Two layers, run again in the backward pass: four calls; where no kernel takes many lengths, for each of six documents.
# The loss of so few tokens takes four chunks.
for _how, _prepare, _dtype, _result in (
    ("in one kernel", keep_documents_apart, torch.bfloat16, {"kernels": 635, **_TOGETHER}),
    ("one by one", repeat_keys, torch.float32, {"kernels": 664, "efficient": 24}),
    ("under a mask", lambda model: None, torch.bfloat16, {"kernels": 676, "efficient": 4}),
):
    SCENARIOS[f"packed rows, {_how}"] = Scenario(_packed(_prepare, _dtype), waits=A_STEP, result=_result)


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


@scenario("results that are known are the mode's own")
def known(card: Card) -> None:
    """Tensor by tensor of two steps: shape, strides (but of sizes of one, where the mode departs from torch's kernel),
    dtype, device, place, and whose storage it has."""
    original, compared = KnownResults.run, 0

    def both(self: KnownResults, func: Any, args: Any, kwargs: Any) -> Any:
        nonlocal compared
        result = original(self, func, args, kwargs)
        if torch.Tag.inplace_view not in func.tags:  # which would be done a second time
            inputs, again = tensors_of((*args, *kwargs.values())), func(*args, **kwargs)
            assert _told(result, inputs) == _told(again, inputs), func
            compared += 1
        return result

    model, method = trained(2)
    with mock.patch.object(KnownResults, "run", both):
        for _ in range(2):
            step(model, method, [batch(1, 32)])
    assert compared > 1000


def _told(result: Any, inputs: list[Tensor]) -> list[Any]:
    told: list[Any] = []
    for one in tensors_of((result,)):
        shared = [one.untyped_storage()._cdata == given.untyped_storage()._cdata for given in inputs]
        strides = [stride for stride, size in zip(one.stride(), one.shape, strict=True) if size != 1]
        told.append((one.shape, strides, one.storage_offset(), one.dtype, one.device, shared))
    return told


def _steps_around_a_failure(card: Card, model: Any, method: Any) -> None:
    """The second one ends where a layer's input is on its way back and nothing has waited for it."""
    start = card.kernels
    step(model, method, [batch(1, 32)])
    card.fail_at = card.kernels + (card.kernels - start) // 2
    with pytest.raises(torch.OutOfMemoryError):
        step(model, method, [batch(1, 32)])
    step(model, method, [batch(1, 32)])


@scenario("steps at level 2, one of which fails")
def failed(card: Card) -> None:
    _steps_around_a_failure(card, *trained(2))


# Of four micro-batches the last two go through pinned memory that the first two have left.
@scenario("micro-batches of many lengths at level 2", waits={**A_STEP, "an event in placement.send": 2})
def lengths(card: Card) -> None:
    model, method = trained(2)
    card.clear()
    step(model, method, [batch(2, 64, lengths=(40, 14, 10)), batch(1, 31), batch(3, 90), batch(2, 64)])


_MUTANTS = {
    "copied out without a wait": (
        "self.out.wait_stream(torch.cuda.current_stream(tensor.device))",
        "side stream reads",
    ),
    "fetched before it is out": ("self.back.wait_stream(self.out)", "side stream reads"),
    "used before it is back": ("current.wait_stream(self.back)", "default stream reads"),
    "given back while copied out": ("tensor.record_stream(self.out)", "freed on the default stream"),
    "given back while in use": ("tensor.record_stream(current)", "freed on the side stream"),
    "written over on its way back": ("self.out.wait_stream(self.back)", "side stream writes what the side stream"),
}


def _mutant(statement: str) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        text = inspect.getsource(checkpointing)
        assert text.count(statement) == 1
        mutant: Any = types.ModuleType("mutant")
        exec(compile(text.replace(statement, "pass"), checkpointing.__file__, "exec"), mutant.__dict__)
        model, method = trained(1)
        mutant.enable_checkpointing(model, offload=True)
        _steps_around_a_failure(card, model, method)

    return run


for _name, (_statement, _fault) in _MUTANTS.items():
    SCENARIOS[f"mutant: {_name}"] = Scenario(_mutant(_statement), fault=_fault)


_WAIT = "self._ended[0].synchronize()"


def _looked_up(wait: str) -> Callable[[Card], None]:
    """The rows of two micro-batches come from a table in host memory, sixteen at a time."""

    def run(card: Card) -> None:
        text = inspect.getsource(placement)
        assert text.count(_WAIT) == 1
        module: Any = types.ModuleType("placement")
        exec(compile(text.replace(_WAIT, wait), placement.__file__, "exec"), module.__dict__)
        model = base(1)
        module.PIECE = 16 * model.get_input_embeddings().weight[0].nbytes
        assert module.move_embeddings_to_host(model)
        card.clear()
        for rows in (batch(2, 64).to(CARD), batch(1, 90).to(CARD)):
            with module.ids_at_hand(model, rows.ids_on_host):
                found = model.get_input_embeddings()(rows.input_ids)
            assert (found.shape, found.device) == ((*rows.input_ids.shape, 128), CARD)

    return run


# Of eight pieces and six all wait but the first two.
SCENARIOS["rows from host memory"] = Scenario(_looked_up(_WAIT), waits={"an event in placement.send": 12})
SCENARIOS["mutant: rows written over on their way"] = Scenario(
    _looked_up("pass"), fault="the host writes what the default stream reads"
)
