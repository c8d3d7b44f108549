"""The bench measures what it says: the same weights, in turns, on a model small enough for a test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from qaroma.bench.contestants import examples, peft_step, qaroma_step, random_base, twin
from qaroma.bench.measure import seconds_per_step, step_flops
from qaroma.bench.sheet import LENGTHS, _Bench, cells_of, fill_sheet
from qaroma.cli import main
from qaroma.plan.search import Planner
from qaroma.plan.shapes import model_config

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


@pytest.mark.slow
def test_a_sheet_is_filled_and_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end, every kind of cell, on a CPU and a tiny shape."""
    tiny_config(num_hidden_layers=2, tie_word_embeddings=False).save_pretrained(tmp_path)
    folder, lengths = tmp_path / "sheet", (16, 32, 48)
    measured, cut_after = [], 3
    measure = _Bench.measured

    def watched(self, cell):
        if len(measured) == cut_after:
            raise KeyboardInterrupt
        measured.append(cell.name)
        return measure(self, cell)

    monkeypatch.setattr(_Bench, "measured", watched)

    def longest(self, settings, room):  # of a tiny model it would take a CPU hours
        return self.estimate(replace(settings, seq_len=64 if room < 6 * 2**30 else 80))

    monkeypatch.setattr(Planner, "longest_context", longest)
    with pytest.raises(KeyboardInterrupt):
        fill_sheet(str(tmp_path), folder, device="cpu", lengths=lengths)
    assert sorted(path.stem for path in folder.iterdir()) == sorted(measured)
    cut_after = 10**6
    table = fill_sheet(str(tmp_path), folder, device="cpu", lengths=lengths)
    levels = [f"level-{level}-{length}" for level in range(5) for length in lengths]
    cards = [f"card-{gib}-{length}" for gib in (6, 8, 12, 16, 24) for length in (32, 48)]
    assert sorted(measured) == sorted([*levels, *cards, "frozen-1-32", "growth-1-32"])  # each once
    figures = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for name in levels:
        assert figures[name]["peak"] == pytest.approx(figures[name]["planned"], rel=0.1)
        assert ("peft" in figures[name]["tokens_per_second"]) == (int(name[6]) < 2)
    assert 0 < figures["growth-1-32"]["share"] < 1
    assert set(figures["frozen-1-32"]["tokens_per_second"]) == {"1", "64"}
    assert {figures[name]["outcome"] for name in cards} == {"ran"}
    assert (folder / "table.md").read_text() == table
    assert table.count("\n| ") == 2 + len(levels) + 2 + len(cards) + 2 + len(longest)


@pytest.mark.slow
def test_the_cells_of_a_sheet_are_those_that_fit() -> None:
    """LLaMA-3-8B on an H100: level 0 keeps too much at 32,768 tokens, and small cards need the lower levels."""
    cells = cells_of(Planner(model_config("llama3-8b")), 78 * 2**30, dtype=torch.bfloat16, lengths=LENGTHS[:3])
    assert [(c.level, c.length) for c in cells if c.kind == "level"] == [(a, b) for a in range(5) for b in LENGTHS[:3]]
    cards = {(cell.gib, cell.length): cell.level for cell in cells if cell.kind == "card"}
    assert cards == {
        (6, 2048): 2, (8, 2048): 1, (12, 2048): 1, (16, 2048): 1, (24, 2048): 0,
        (6, 8192): 2, (8, 8192): 2, (12, 8192): 1, (16, 8192): 1, (24, 8192): 1,
    }  # fmt: skip
