"""The pieces without our loop: examples/own_loop.py, run as a researcher would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loop.py"


def test_the_example_runs_grows_and_writes_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tiny_folder), "growth grows a component at a time", "45"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "step 20: " in done.stdout
    assert "14 modules decided" in done.stdout
    growth = json.loads((tmp_path / "own_loop_adapter" / "growth.json").read_text())
    assert sum(map(sum, growth["components"].values())) > 14


def test_the_loop_is_about_thirty_lines() -> None:
    source = EXAMPLE.read_text(encoding="utf-8").split('"""', 2)[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 32
