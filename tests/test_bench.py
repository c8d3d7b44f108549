"""The bench measures what it says: the same weights, in turns, on a model small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from qaroma.bench.contestants import examples, peft_step, qaroma_step, random_base, twin
from qaroma.bench.measure import seconds_per_step, step_flops
from qaroma.cli import main

CPU = torch.device("cpu")


def test_random_base_is_a_whole_4_bit_model() -> None:
    model = random_base(tiny_config(tie_word_embeddings=False), dtype=torch.float32, device=CPU)
    assert not any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    packed = [m for m in model.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None]
    assert len(packed) == 14
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_twin_has_other_modules_and_the_same_weights() -> None:
    model = random_base(tiny_config(), dtype=torch.float32, device=CPU)
    other = twin(model)
    assert other.model.layers[0] is not model.model.layers[0]
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_both_contestants_train(tiny_folder: Path) -> None:
    model = random_base(tiny_config(), dtype=torch.float32, device=CPU)
    rows = examples(512, rows=2, length=24)
    other = twin(model)
    theirs = peft_step(other, rows)
    ours, method = qaroma_step(model, rows, level=1, frozen=3)
    weights = {n: p.detach().clone() for n, p in other.named_parameters() if "lora_B" in n}
    before = method.trainer.optimiser.values.clone()
    ours()
    theirs()
    assert weights
    assert all(not torch.equal(p, weights[n]) for n, p in other.named_parameters() if "lora_B" in n)
    assert not torch.equal(method.trainer.optimiser.values, before)
    assert method.adapter.layers["model.layers.0.mlp.up_proj"].rank == 4


def test_contestants_take_turns() -> None:
    order: list[str] = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = seconds_per_step(steps, count=2, rounds=3, device=CPU)
    assert order == ["a", "a", "b", "b"] + ["a", "a", "b", "b"] * 3  # two uncounted steps of each first
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_flops_of_a_step_by_hand() -> None:
    model = nn.Module()
    model.layer, model.head = nn.Linear(64, 128), nn.Linear(64, 512)
    model.config = tiny_config(num_hidden_layers=1)
    model.get_output_embeddings = lambda: model.head
    attention = 2 * 2 * 32 * 64 / 2  # scores and their sum over half of 32 positions, 4 heads of 16
    expected = 10 * (3 * 2 * 64 * 128 + 2 * 2 * 64 * 512 + 4.5 * attention)
    assert step_flops(model, tokens=10, length=32, checkpointed=True) == pytest.approx(expected)


def test_the_command_prints_ratios(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "--model",
        str(tiny_folder),
        "--seq-len",
        "64",
        "--steps",
        "1",
        "--rounds",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*command, "--against", "peft", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["qaroma"]["peak_bytes"] > 0
    ours, theirs = (figures[n]["seconds_per_step"]["median"] for n in ("qaroma", "peft"))
    assert figures["speed_ratio"]["low"] <= figures["speed_ratio"]["median"] <= figures["speed_ratio"]["high"]
    assert theirs / ours == pytest.approx(figures["speed_ratio"]["median"], rel=1.0)
    assert figures["memory_ratio"] == figures["qaroma"]["peak_bytes"] / figures["peft"]["peak_bytes"]
