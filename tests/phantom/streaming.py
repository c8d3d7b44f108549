"""The base streamed: steps, loading, relief and generation, and the stream with each of its waits taken out."""

from __future__ import annotations

import gc
import inspect
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import tiny_config
from transformers import LlamaForCausalLM

from phantom.card import Card
from phantom.registry import SCENARIOS, Scenario, scenario
from phantom.steps import A_STEP
from phantom.world import CONFIG, base, batch, for_real, growing, step, trained, whole_program
from qaroma.engine import streaming
from qaroma.engine.levels import apply_level
from qaroma.model.base import load_base
from qaroma.model.layers import decoder_layers, layer_matrices

DEEP = {"num_hidden_layers": 5}


@scenario("a step with a streamed base", waits=A_STEP)
def streamed(card: Card) -> None:
    model, method = trained(4, sizes=DEEP)
    step(model, method, [batch()])
    card.clear()
    step(model, method, [batch()] * 2)


@scenario("a base that is streamed from the middle of a run on", waits=A_STEP)
def relieved(card: Card) -> None:
    model, method = trained(3, sizes=DEEP)
    step(model, method, [batch()])
    before = card.order.allocated
    apply_level(model, 4)
    layers, buffers = model.layer_stream.bytes, sum(buffer.nbytes for buffer in model.layer_stream.buffers)
    assert before - card.order.allocated > 0.9 * (layers - buffers)
    step(model, method, [batch()])
    card.clear()
    step(model, method, [batch()])


@scenario("growth with a streamed base")
def grown(card: Card) -> None:
    model = base(4, **DEEP)
    apply_level(model, 4)
    method = growing(model.train(), t_in=2, check_every=1, warmup=1, restart_warmup=1)
    card.tolist = lambda tensor: [[1.0, 1.0, float("nan")]] * tensor.shape[0] if tensor.dim() == 2 else [1.0, 1.0]
    for _ in range(3):
        step(model, method, [batch(1, 32)])
    assert max(method.adapter.ranks().values()) > 1


def _save(folder: str) -> None:
    LlamaForCausalLM(tiny_config(**{**CONFIG, **DEEP})).save_pretrained(folder)


@scenario("loading a base that is streamed")
def loaded(card: Card) -> None:
    """The card never holds two layers' worth of the base beside what stays there."""
    with tempfile.TemporaryDirectory() as folder:
        for_real(_save)(folder)
        with whole_program(card):
            start = card.order.allocated
            model = load_base(Path(folder), device="cuda", host_embeddings=True, quantize_head=True, host_layers=True)
    matrices = [getattr(*place) for layer in decoder_layers(model) for place in layer_matrices(layer)]
    assert {matrix.device.type for matrix in matrices} == {"cpu"}
    packed = sum(matrix.nbytes for matrix in matrices)
    stays = sum(p.nbytes for p in model.parameters() if p.is_cuda)
    assert card.order.allocated - start < stays + packed / 5
    apply_level(model, 4)
    method = growing(model.train())
    step(model, method, [batch()])
    card.clear()
    step(model, method, [batch()])


_MUTANTS = {
    "overwritten while in use": (
        "self._copies.wait_stream(torch.cuda.current_stream(self.device))",
        "side stream writes",
    ),
    "used before it is there": (
        "torch.cuda.current_stream(self.device).wait_stream(self._copies)",
        "default stream reads",
    ),
    "given back on its way": ("buffer.record_stream(self._copies)", "freed on the default stream"),
}


def _mutant(statement: str) -> Callable[[Card], None]:
    def run(card: Card) -> None:
        text = inspect.getsource(streaming)
        assert text.count(statement) == 1
        mutant: Any = types.ModuleType("mutant")
        exec(compile(text.replace(statement, "pass"), streaming.__file__, "exec"), mutant.__dict__)
        model, method = trained(3, sizes=DEEP)
        mutant.stream_layers(model)
        step(model, method, [batch()])
        model.layer_stream.ask(2)  # and 3 is on its way
        del model, method
        gc.collect()

    return run


for _name, (_statement, _fault) in _MUTANTS.items():
    SCENARIOS[f"mutant: a streamed layer {_name}"] = Scenario(_mutant(_statement), fault=_fault)
