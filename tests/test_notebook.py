"""The notebook: valid, without output, its commands such as qaroma takes; and run, cell by cell, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
from test_pages import ROOT, parse

NOTEBOOK = ROOT / "examples" / "colab.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def code() -> list[str]:
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]


def split(cell: str) -> tuple[str, list[str]]:
    """The Python of a cell, and the lines that a shell gets, without their mark."""
    lines = cell.splitlines()
    return "\n".join(line for line in lines if line[:1] != "!"), [line[1:] for line in lines if line[:1] == "!"]


def test_it_is_a_notebook_without_output() -> None:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["metadata"]["accelerator"]) == (4, "GPU")
    assert len({cell["id"] for cell in cells()}) == len(cells())
    for cell in cells():
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_its_commands_are_such_as_qaroma_takes_and_its_files_are_there() -> None:
    values: dict[str, Any] = {}
    seen = []
    for cell in code():
        python, lines = split(cell)
        exec(python, values)
        for line in lines:
            line = Template(line).substitute(values).rpartition(" | ")[2]
            if line.startswith("qaroma"):
                parse(line)
                seen.append(shlex.split(line)[1])
            for file in re.findall(r"qaroma/(\S+\.py)", line):
                assert (ROOT / file).is_file()
    assert seen == ["doctor", "data", "plan", "finetune", "finetune", "chat", "export"]


@pytest.mark.slow
def test_every_cell_runs_on_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "qaroma").symlink_to(ROOT)  # as the first cell clones it
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ours = {"MODEL": str(tiny_folder), "STEPS": 3}
    values: dict[str, Any] = {}
    said = ""
    for cell in code():
        python, lines = split(cell)
        exec(python, values)
        values |= {name: value for name, value in ours.items() if name in values}
        for line in lines:
            if line.startswith(("git clone ", "pip install ")):
                continue
            done = subprocess.run(
                ["bash", "-c", Template(line).substitute(values)],
                cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            said += done.stdout + done.stderr
    assert "0 problems" in said
    assert "3 steps" in said
    assert "self-test passed" in said
    assert (tmp_path / "runs" / "mine" / "export" / "gguf" / "Modelfile").is_file()
