"""While a run trains: the live panel, plain lines in a pipe, samples, trackers, and the growing page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_training import make_config, records

from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.training import live_page as page_module
from qaroma.training.finetune import finetune
from qaroma.training.progress import ProgressView, curve

QUIET = Console(quiet=True)
RECORD = {
    "step": 5, "loss": 1.25, "learning_rate": 1e-3, "mean_rank": 1.5, "active_modules": 14,
    "trainable_parameters": 12345, "tokens_per_second": 100.0, "memory_bytes": 2**30,
}  # fmt: skip


def test_the_curve_rises_where_the_values_do() -> None:
    assert curve([]) == ""
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([0.0, 0.5, 1.0]) == "▁▅█"


def test_a_terminal_gets_one_panel_and_a_pipe_plain_lines() -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    for stream, force in ((terminal, True), (pipe, False)):
        console = Console(file=stream, force_terminal=force, width=100)
        with ProgressView(console, total=20) as view:
            view.step(RECORD, [])
            view.validation(5, {"loss": 0.7, "accuracy": 0.8123}, "accuracy", best=True)
    assert "12,345" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
    assert pipe.getvalue().splitlines() == [
        "step 5/20  loss 1.250  lr 1.0e-03  rank 1.50  active 14  params 12,345  100 tok/s  1.00 GiB",
        "step 5: validation loss 0.7000, accuracy 0.8123 (best so far)",
    ]


def with_page(*arguments: Any, **changes: Any) -> Config:
    return make_config(*arguments, evaluation__report=True, **changes)


def test_chosen_prompts_are_answered_again_and_again(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = with_page(tiny_folder, data_file, tmp_path / "run", training__max_steps=6, training__evaluate_every=6)
    config.evaluation.prompts, config.evaluation.sample_every = ["count 3 <b>", "count 4"], 2
    config.evaluation.max_new_tokens = 4
    finetune(config, console=QUIET)
    samples = records(tmp_path / "run", "samples")
    assert [s["step"] for s in samples] == [0, 2, 4, 6]
    assert all(s["prompts"] == ["count 3 <b>", "count 4"] and len(s["answers"]) == 2 for s in samples)
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "count 3 &lt;b&gt;" in text
    assert "<b>" not in text.replace("<body", "")


def test_sampling_changes_no_number(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    for run in (plain, sampled):
        config = make_config(tiny_folder, data_file, run, training__max_steps=6)
        if run is sampled:
            config.evaluation.prompts, config.evaluation.max_new_tokens = ["count 3"], 4
        finetune(config, console=QUIET)
    ours, theirs = ((r / "adapter_last" / "adapter_model.safetensors").read_bytes() for r in (plain, sampled))
    assert ours == theirs


def test_the_page_can_be_opened_at_any_moment_and_follows(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", []
    original = page_module.write_page

    def watched(path: Path, *, stopped: bool) -> Path:
        written = original(path, stopped=stopped)
        seen.append('http-equiv="refresh"' in written.read_text(encoding="utf-8"))
        return written

    monkeypatch.setattr(page_module, "write_page", watched)
    finetune(with_page(tiny_folder, data_file, run, training__max_steps=6, training__evaluate_every=3), console=QUIET)
    assert seen == [True, True, True, False]  # step 0, two validations, the end


def test_a_page_that_fails_costs_no_run(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, *, stopped: bool) -> Path:
        raise RuntimeError("no font")

    monkeypatch.setattr(page_module, "write_page", broken)
    told = io.StringIO()
    config = with_page(tiny_folder, data_file, tmp_path / "run", training__max_steps=4)
    assert finetune(config, console=Console(file=told, width=200))["steps"] == 4
    assert told.getvalue().count("report.html is not kept up to date: no font") == 1


def test_tensorboard_gets_every_step(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = make_config(tiny_folder, data_file, run, training__max_steps=6, training__track=["tensorboard"])
    finetune(config, console=QUIET)
    log = EventAccumulator(str(run / "tensorboard"))
    log.Reload()
    ours = [(s["step"], s["loss"]) for s in records(run)]
    theirs = [(e.step, e.value) for e in log.Scalars("loss")]
    assert [step for step, _ in theirs] == [step for step, _ in ours]
    assert [value for _, value in theirs] == pytest.approx([value for _, value in ours])
    assert "validation/loss" in log.Tags()["scalars"]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qaroma.training.setup.load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = Config.model_validate(make_config(tiny_folder, data_file, tmp_path / "run").model_dump())
    config.training.track = ["wandb"]
    with pytest.raises(
        QaromaError, match="--track wandb needs a package that is not installed; type: pip install wandb"
    ):
        finetune(config, console=QUIET)
