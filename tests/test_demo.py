"""The demo: its task is seeded, exact, and split by argument combinations; its command goes on where it was."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from qaroma.cli import main
from qaroma.config.load import shipped_folder
from qaroma.data.demo import TEST_ROWS, TRAIN_ROWS, rows

Split = Literal["train", "test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_a_function_of_split_count_and_seed(split: Split) -> None:
    assert rows(split, 60, 3) == rows(split, 60, 3)
    assert rows(split, 60, 3) != rows(split, 60, 4)


def test_first_rows_are_pinned() -> None:
    """A change of the generator would silently change every published quickstart figure."""
    assert [row["output"] for row in rows("test", 100, 0)[:3]] == [
        '{"call": "timer", "for": "homework", "minutes": 35}',
        '{"call": "timer", "for": "cake", "minutes": 5}',
        '{"call": "meet", "with": "Nora", "day": "Monday", "hour": 15}',
    ]


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN_ROWS), ("test", TEST_ROWS)])
def test_rows_are_alpaca_all_different_and_balanced(split: Split, count: int) -> None:
    drawn = rows(split, count, 0)
    assert len(drawn) == count
    assert {tuple(row) for row in drawn} == {("instruction", "input", "output")}
    assert len({row["instruction"] for row in drawn}) == count
    calls = Counter(json.loads(row["output"])["call"] for row in drawn)
    assert len(calls) == 4
    assert max(calls.values()) - min(calls.values()) <= 1


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (5, 2)])
def test_no_argument_combination_of_the_test_occurs_in_training(seeds: tuple[int, int]) -> None:
    train = {row["output"] for row in rows("train", 2000, seeds[0])}
    test = {row["output"] for row in rows("test", 500, seeds[1])}
    assert len(test) > 100
    assert not train & test
    # Not vacuous: two draws of one split with these sizes do overlap.
    assert train & {row["output"] for row in rows("train", 500, seeds[1] + 1)}


def test_each_single_value_of_the_test_is_trained() -> None:
    """Only combinations are held out; a value never seen would ask for more than composition."""

    def values(split: Split, count: int) -> set[tuple[str, str]]:
        calls = [json.loads(row["output"]) for row in rows(split, count, 0)]
        return {(call["call"] + "." + key, str(value)) for call in calls for key, value in call.items()}

    assert values("test", 400) <= values("train", 2500)


def test_every_argument_stands_in_the_request() -> None:
    for row in rows("train", 400, 1):
        call = json.loads(row["output"])
        assert json.dumps(call) == row["output"]
        for key, value in call.items():
            if key != "call":
                assert str(value) in row["instruction"]


def test_an_unknown_split_and_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        rows("valid", 3, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at most"):
        rows("test", 100_000, 0)


@pytest.fixture
def small_demo(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's configuration with a tiny model and few steps, for a command in an empty folder."""
    values = yaml.safe_load((shipped_folder() / "quickstart.yaml").read_text(encoding="utf-8"))
    values["model"]["name"] = str(tiny_folder)
    values["training"] |= {"max_steps": 6, "micro_batch": 2, "evaluate_every": 3}
    values["evaluation"] |= {"rows": 2, "max_new_tokens": 4}
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr("qaroma.config.shipped.shipped_folder", lambda: tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.usefixtures("small_demo")
def test_the_demo_goes_on_when_it_is_typed_again_and_then_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qaroma.training.progress import ProgressView

    def interrupting(view: ProgressView, record: Any, events: Any) -> None:
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(ProgressView, "step", interrupting)
        assert main(["demo"]) == 130
    said = capsys.readouterr().err
    assert "It shows the tool, not the method" in said
    assert "saved at step 4; go on with: qaroma finetune --resume --output runs/demo" in said

    assert main(["demo", "--json"]) == 0
    told = capsys.readouterr()
    figures = json.loads(told.out)
    assert (figures["steps"], figures["run"]) == (6, "runs/demo")
    assert [json.loads(line)["step"] for line in Path("runs/demo/metrics.jsonl").read_text().splitlines()
            if line.startswith('{"step"')] == [1, 2, 3, 4, 5, 6]  # fmt: skip
    for command in ("qaroma chat runs/demo", "qaroma export runs/demo", "qaroma report runs/demo", "qaroma init"):
        assert f" {command}" in told.err

    assert main(["demo", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == figures
    assert "runs/demo is finished. Type next: qaroma chat runs/demo" in told.err


@pytest.mark.usefixtures("small_demo")
def test_the_demo_goes_on_with_no_run_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/config.yaml").write_text("model: {name: m}\ndata: {train: mine.jsonl}\n", encoding="utf-8")
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "cannot resume runs/demo with other settings: " in said
    assert "model.name was m, now " in said
