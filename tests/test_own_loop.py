"""The pieces without our loop: examples/own_loop.py, run as a researcher would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import qaroma
from qaroma import BudgetSettings, JointController, attach, load_base, load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loop.py"


def test_the_example_runs_grows_and_writes_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tiny_folder), "growth grows a component at a time", "45"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "step 20: " in done.stdout
    assert "14 modules decided" in done.stdout
    growth = json.loads((tmp_path / "own_loop_adapter" / "growth.json").read_text())
    assert sum(map(sum, growth["components"].values())) > 14


def test_growth_within_a_budget_in_a_loop(tiny_folder: Path) -> None:
    model = load_base(tiny_folder, quantization="none", device="cpu")
    adapter = attach(model, targets=["q_proj", "v_proj"], inner_rank=1, alpha=2.0)
    growth = JointController(adapter, BudgetSettings(start_rank=2, max_rank=4), learning_rate=1e-2, total_steps=12)
    batch = load_tokenizer(tiny_folder)(["growth grows"], return_tensors="pt").input_ids
    losses = []
    for _ in range(12):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        growth.step(loss.item())
        losses.append(loss.item())
    growth.finish()
    assert losses[-1] < losses[0]
    assert min(adapter.ranks().values()) >= 2


def test_every_name_of_the_library_is_there() -> None:
    assert all(getattr(qaroma, name) is not None for name in qaroma.__all__)


def test_the_loop_is_about_thirty_lines() -> None:
    source = EXAMPLE.read_text(encoding="utf-8").split('"""', 2)[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 32
