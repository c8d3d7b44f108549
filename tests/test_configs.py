"""Every configuration that comes with qaroma runs, and says what it takes; the commands that list and copy them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from qaroma.cli import main
from qaroma.config.load import read_settings, shipped_configs, shipped_folder
from qaroma.config.shipped import list_shipped

ROOT = Path(__file__).resolve().parent.parent
NAMES = shipped_configs()


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_memory_time_and_score_and_how_they_are_known(name: str) -> None:
    (shipped,) = (one for one in list_shipped() if one.name == name)
    assert shipped.title.endswith((".", ":"))
    for word in ("memory", "time", "score"):
        assert word in shipped.needs.lower(), word
    assert shipped.needs.startswith(("MEASURED", "PLANNED", "NOT RUN"))
    text = (shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"qaroma finetune --config {name}" in text.replace("--config configs/", "--config ")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_a_tiny_model(
    name: str, tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_settings(name, {}, [])
    changes = {
        "model.name": tiny_folder, "data.train": stand_in(config.task, data_file, tmp_path), "data.validation": "null",
        "training.max_steps": 2, "training.device": "cpu", "training.micro_batch": 2, "training.grad_accum": 1,
        "training.evaluate_every": 1, "checkpoint.every": 1, "evaluation.data": "null", "output": tmp_path / "run",
    }  # fmt: skip
    if config.task != "causal-lm":
        changes["growth.target_modules"] = "all-linear"  # the stand-in is no encoder
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    code = main(["finetune", "--config", name, "--json", *sets])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert json.loads(told.out)["steps"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if "glue" in name])
def test_the_papers_six_matrices_of_an_encoder_layer_are_adapted_and_the_head_is_not(name: str) -> None:
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from qaroma.method.targets import find_targets

    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(num_hidden_layers=2))
    wanted = read_settings(name, {}, []).growth.target_modules
    assert wanted is not None
    found = find_targets(model, wanted)
    assert len(found) == 12
    assert all(module.startswith("roberta.encoder.") for module in found)


def stand_in(task: str, data_file: Path, tmp_path: Path) -> Path:
    """Data of the kind that a task takes."""
    if task == "causal-lm":
        return data_file
    rows = [{"text": f"count {n} " + "x" * (n % 7), "label": n % 2} for n in range(60)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_wheel_that_pip_builds_has_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel without the network")
    source = tmp_path / "source"
    for folder in ("configs", "qaroma"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {f"qaroma/configs/{name}.yaml" for name in NAMES} <= set(inside)
    assert "qaroma/configs/constraints.txt" in inside
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "qaroma").rglob("*") if path.suffix in (".py", ".html")
    }
    assert modules <= set(inside)  # every package stands in pyproject.toml


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "ls"]) == 0
    text = capsys.readouterr().out
    assert "quickstart\n  The main job in minutes" in text
    assert "MEASURED: memory 1.9 GiB" in text
    assert max(map(len, text.splitlines())) <= 100
    assert main(["configs", "ls", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["configs"]] == NAMES


@pytest.mark.parametrize("typed", ["quickstart", "configs/quickstart.yaml", "quickstart.yaml"])
def test_copying(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "cp", typed]) == 0
    assert "type next: qaroma finetune --config quickstart.yaml" in capsys.readouterr().out
    shipped = (shipped_folder() / "quickstart.yaml").read_text(encoding="utf-8")
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_text(encoding="utf-8") == shipped
    assert yaml.safe_load(shipped)["model"]["name"] == "smollm2-135m"
    copied.write_text("mine", encoding="utf-8")
    assert main(["configs", "cp", typed]) == 2
    assert "left as it was; type --force" in capsys.readouterr().err
    assert copied.read_text(encoding="utf-8") == "mine"
    assert main(["configs", "cp", typed, ".", "--force"]) == 0
    assert main(["configs", "cp", typed, "sub/mine.yaml"]) == 0
    assert (tmp_path / "sub" / "mine.yaml").read_text(encoding="utf-8") == copied.read_text(encoding="utf-8") == shipped


def test_an_unknown_name_comes_with_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "cp", "quikstart"]) == 2
    assert "did you mean quickstart? expected one that comes with qaroma: " in capsys.readouterr().err
    assert main(["configs", "cp", "../README.md"]) == 2
    assert main(["configs"]) in (0, 2)
