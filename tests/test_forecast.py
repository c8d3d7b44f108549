"""What is said before a run: three lines, the decisions when asked for, and a rehearsal that writes nothing."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_training import make_config

from qaroma.cli import main
from qaroma.config.load import read_settings
from qaroma.config.words import rough_time
from qaroma.errors import QaromaError
from qaroma.plan.card import parse_card
from qaroma.plan.report import EPOCHS, make_plan
from qaroma.plan.trace import StepSettings
from qaroma.runs.directory import RunDirectory
from qaroma.training import forecast
from qaroma.training.finetune import finetune
from qaroma.training.prepare import prepare_data

TYPED = ["--max-steps", "4", "--device", "cpu"]


def test_a_rehearsal_tells_all_and_writes_nothing(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qaroma.training.setup.load_base", never)
    arguments = ["finetune", "--model", str(tiny_folder), "--data", str(data_file), *TYPED, "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["rows"], told["validation_rows"], told["steps"], told["level"]) == (57, 3, 4, 0)
    assert told["run"] == "runs/tiny-llama-rows"
    assert (told["seconds"], told["card"]) == (None, None)
    assert told["sentences"]["takes"].endswith("; the time is said from the second step on")
    assert {"key": "growth.inner_rank", "value": 1, "reason": "rank-one components"} in told["decisions"]
    assert "training.learning_rate " in err
    assert "3 rows to validate on are few" in err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--resume", "--output", "runs/x"]) == 2
    assert "got --dry-run with --resume" in capsys.readouterr().err


def test_on_a_card_that_is_known_the_time_is_told_by_arithmetic(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "_known_card", lambda device: parse_card("rtx3060"))
    config = make_config(tiny_folder, data_file, tmp_path / "run", training__max_steps=5000, training__grad_accum=1)
    data = prepare_data(config)
    told = forecast.forecast(data)
    assert told.card == "RTX 3060"
    assert told.seconds is not None
    training = data.config.training
    rows = training.max_steps * training.micro_batch
    mean = sum(example.tokens for example in data.train) / len(data.train)
    settings = StepSettings(
        told.level, math.ceil(mean), training.micro_batch, inner_rank=1, dtype=torch.float32, card=False
    )
    plan = make_plan(str(tiny_folder), settings, memory=str(told.level), cards=(parse_card("rtx3060"),), rows=rows)
    assert told.seconds == pytest.approx(plan.run_seconds(plan.shown, plan.cards[0]) / EPOCHS, rel=1e-6)
    takes = forecast.sentences(data.config, told, RunDirectory(tmp_path / "run"))["takes"]
    assert f"the time is about {rough_time(told.seconds)} on one RTX 3060 by arithmetic" in takes

    def never(*_: object) -> None:
        raise QaromaError("its step depends on values")

    monkeypatch.setattr("qaroma.plan.search.WeightlessTraining", never)
    assert forecast.forecast(data).seconds is None


def test_a_run_takes_no_more_disk_and_memory_than_was_said(
    tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["finetune", "--model", str(tiny_folder), "--data", str(data_file), *TYPED, "--output", str(tmp_path / "r")]
    assert main([*typed, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main([*typed, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    used = sum(file.stat().st_size for file in (tmp_path / "r").rglob("*") if file.is_file())
    assert 0.1 * told["disk_bytes"] < used < told["disk_bytes"]
    assert figures["memory_bytes"] < told["memory_bytes"]


def test_before_a_run_stand_three_plain_lines_and_the_reasons_in_its_configuration(
    tiny_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", io.StringIO()
    config = make_config(tiny_folder, data_file, run, training__max_steps=2, evaluation__report=True)
    finetune(config, console=Console(file=out, width=200))
    before = out.getvalue().split("step 0")[0].splitlines()
    assert [line.split("  ")[0] for line in before[-4:-1]] == ["learns from", "takes", "needs"]
    assert before[-1] == f"follow it in {(run / 'report.html').as_posix()}"
    assert run.as_posix() in before[-2]
    assert "growth." not in out.getvalue()
    written = (run / "config.yaml").read_text(encoding="utf-8")
    assert "  inner_rank: 1  # rank-one components\n" in written
    assert read_settings(run / "config.yaml", {}, []).training.max_steps == 2
    said = io.StringIO()
    finetune(
        make_config(tiny_folder, data_file, tmp_path / "other", training__max_steps=2),
        verbose=True, console=Console(file=said, width=200),
    )  # fmt: skip
    assert "growth.inner_rank " in said.getvalue()
