"""qaroma init: what it decides from data and card, the file that it writes, and a run from that file."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from qaroma.cli import main
from qaroma.config.decisions import DataFacts, Decision
from qaroma.config.load import read_settings
from qaroma.config.presets import resolve
from qaroma.config.resolved import ResolvedConfig
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.plan.configure import Room, Start, fit_step, letters, make_start, room_for, start_yaml
from qaroma.plan.search import Estimate, Planner
from qaroma.plan.trace import StepSettings
from qaroma.training.prepare import prepare_data


class StraightPlanner(Planner):
    """A step takes a byte a token at level 0, half of that at each level more; from level 2 on half on the host."""

    def __init__(self) -> None:
        pass

    def estimate(self, settings: StepSettings) -> Estimate:
        size = settings.seq_len * settings.micro_batch // 2**settings.level
        host = size if settings.level >= 2 else 0
        return Estimate(settings, size, 0, host, {}, {})


@pytest.mark.parametrize(
    ("device", "host", "expected"),
    [
        (8192, 0, (1024, 8, 0)),
        (8191, 0, (1024, 4, 0)),
        (1024, 0, (1024, 1, 0)),
        (1023, 0, (1024, 1, 1)),
        (300, 400, (1024, 1, 2)),
        (300, 255, (1024, 1, None)),  # too little host memory for level 2, and level 3 takes half of it
        (40, 2**40, (640, 1, 4)),
        (1024, None, (1024, 1, 0)),
        (511, None, (1024, 1, 3)),  # the host is the device: both count
    ],
)
def test_the_fastest_level_then_the_largest_micro_batch(device: int, host: int | None, expected: tuple) -> None:
    length, count, level = expected
    found = fit_step(StraightPlanner(), StepSettings(0, 1024), Room(device, host, "x")).settings
    assert (found.seq_len, found.micro_batch) == (length, count)
    assert level is None or found.level == level


def test_nothing_fits() -> None:
    with pytest.raises(QaromaError, match=r"not even the smallest step fits a toy; .*--vram 12GiB"):
        fit_step(StraightPlanner(), StepSettings(0, 1024), Room(7, 0, "a toy"))


def test_letters() -> None:
    assert letters("Hello, 123!") == "Latin 100%"
    assert letters("привет мир" + "a" * 3) == "Cyrillic 75%, Latin 25%"
    assert letters("a" * 1000 + "я") == "Latin 100%"
    assert letters("123 ...") == ""


def test_rooms() -> None:
    card = room_for("8GiB")
    assert card.device < 8 * 2**30
    assert card.host is not None
    assert card.dtype == torch.bfloat16
    assert room_for("CPU").name == "cpu"
    assert room_for("cpu").host is None
    with pytest.raises(QaromaError, match="expected a size"):
        room_for("big")
    with pytest.raises(QaromaError, match="that are kept free"):
        room_for("512MiB")


@pytest.fixture(scope="module")
def start(tiny_folder: Path, data_file: Path) -> Start:
    config = read_settings(None, {"model.name": str(tiny_folder), "data.train": [str(data_file)]}, [])
    return make_start(config, Room(2**30, None, "a toy card"))


def test_the_choices_follow_data_plan_and_preset(start: Start) -> None:
    config, look = start.config, start.data
    assert (look.form, look.rows) == ("alpaca", 60)
    assert look.median <= look.p95 <= look.p99 <= look.longest
    assert config.data.max_length == max(64, math.ceil(look.p95 / 64) * 64)
    assert config.training.micro_batch * config.training.grad_accum == 16
    assert start.step.settings.micro_batch == config.training.micro_batch
    # A run that is given no more than the sizes decides the same.
    sizes = {"micro_batch": config.training.micro_batch, "grad_accum": config.training.grad_accum}
    data = {"train": [{"path": config.data.train[0].path}], "max_length": config.data.max_length}
    asked = Config.model_validate({"model": {"name": config.model.name}, "data": data, "training": sizes})
    preset = prepare_data(asked).config
    assert preset.growth == config.growth
    assert preset.training.max_steps == config.training.max_steps
    assert preset.training.learning_rate == config.training.learning_rate


def test_every_line_is_explained_and_the_file_says_what_was_decided(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(start_yaml(start, "mine.yaml"), encoding="utf-8")
    loaded = read_settings(file, {}, [])
    for section in ("data", "growth", "checkpoint"):
        assert getattr(loaded, section).model_dump() == getattr(start.config, section).model_dump(), section
    training = start.config.training.model_dump()
    assert loaded.training.model_dump() == {**training, "memory": str(start.step.settings.level)}
    lines = file.read_text(encoding="utf-8").splitlines()
    assert max(len(line) for line in lines if "/" not in line) <= 100
    for before, line in pairwise(lines):
        if line.startswith("  ") and not line.startswith("  #"):
            assert before.startswith("  # "), line
    header = "\n".join(line for line in lines if line.startswith("#"))
    for words in ("qaroma finetune --config mine.yaml", "PLANNED: memory", "time and score are not", "a toy card"):
        assert words in header.replace("\n# ", " ")


def test_sources_weights_and_names_that_yaml_would_misread(start: Start) -> None:
    sources = [{"path": "C:\\my data\\#1.jsonl", "weight": 0.5}, {"path": "yes", "weight": 1}]
    config = Config.model_validate({**start.config.model_dump(), "data": {"train": sources}})
    choices = tuple(replace(c, value=config.data.train) if c.key == "data.train" else c for c in start.choices)
    written = yaml.safe_load(start_yaml(replace(start, config=config, choices=choices), "x.yaml"))
    assert written["data"]["train"] == [{"path": "C:\\my data\\#1.jsonl", "weight": 0.5}, "yes"]


def test_long_rows_are_counted_and_the_models_limit_holds(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "count " * (600 if n < 2 else 5), "completion": "done"} for n in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = read_settings(None, {"model.name": str(tiny_folder), "data.train": [str(data)]}, [])
    few = make_start(config, Room(2**30, None, "x"))
    assert few.left_out == 2
    assert few.config.data.max_length == 64
    assert "2 of 60 rows are longer and left out" in start_yaml(few, "x").replace("\n  # ", " ")
    data.write_text("".join(json.dumps(rows[min(n, 1 + n % 2)]) + "\n" for n in range(60)), encoding="utf-8")
    many = make_start(config, Room(2**30, None, "x"))
    assert many.config.data.max_length == 512
    assert many.data.p95 > 512
    assert many.left_out == 31


def test_it_decides_by_the_facts_that_training_decides_by(
    tiny_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[DataFacts] = []

    def noted(config: Config, of_data: DataFacts) -> tuple[ResolvedConfig, list[Decision]]:
        facts.append(of_data)
        return resolve(config, of_data)

    monkeypatch.setattr("qaroma.plan.configure.resolve", noted)
    monkeypatch.setattr("qaroma.training.prepare.resolve", noted)
    asked = {
        "model": {"name": str(tiny_folder)},
        "data": {"train": [{"path": str(data_file)}], "train_on": "all"},
        "growth": {"target_modules": ["q_proj"]},
    }
    make_start(Config.model_validate(asked), Room(2**30, None, "x"))
    prepare_data(Config.model_validate(asked))
    assert facts[0].model is not None
    assert facts[0].model.component_parameters == 2 * (64 + 64)  # the q_proj of two layers
    assert facts[0].model == facts[1].model
    assert facts[0].trained_bits == facts[1].trained_bits


def test_init_then_finetune(
    tiny_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["init", "--model", str(tiny_folder), "--data", str(data_file), "--vram", "cpu"]
    assert main(typed) == 0
    told = capsys.readouterr().out
    assert "  qaroma finetune --config rows.yaml" in told
    assert read_settings("rows.yaml", {}, []).training.device == "cpu"
    assert main(["finetune", "--config", "rows.yaml", "--max-steps", "2", "--output", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    written = Path("rows.yaml").read_text(encoding="utf-8")
    assert main(typed) == 2
    assert "rows.yaml is there already and is left as it was; type --force" in capsys.readouterr().err
    assert Path("rows.yaml").read_text(encoding="utf-8") == written
    assert main([*typed, "--vram", "8GiB", "--force"]) == 0
    assert Path("rows.yaml").read_text(encoding="utf-8") != written


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_it_asks_until_the_answer_can_be_used(
    tiny_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = ["no such folder!", str(tiny_folder), "none.jsonl", str(data_file), "big", "cpu", "sub/asked.yaml"]
    monkeypatch.setattr("sys.stdin", Terminal("".join(answer + "\n" for answer in answers)))
    assert main(["init"]) == 0
    told = capsys.readouterr()
    for question in ("Model: a folder", "Data: a file", "The card: its memory", "Write to [rows.yaml]"):
        assert question in told.out + told.err
    for complaint in ("There is no folder", "there is no file or folder 'none.jsonl'", "expected a size"):
        assert complaint in told.err
    assert read_settings("sub/asked.yaml", {}, []).model.name == str(tiny_folder)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["init"], "got no --model and --data"),
        (["init", "--yes"], "got no --data"),
        (["init", "--data", "x.jsonl"], "got no --model"),
        (["init", "--model", "smollm2-135m", "--data", "none.jsonl", "--vram", "big"], "--vram 8GiB"),
    ],
)
def test_what_is_missing_is_named_where_nobody_can_be_asked(
    typed: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(typed) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
