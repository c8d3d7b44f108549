"""How a run ended, as it is judged: the step of its adapter, what was wasted, and whether more would help."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_training import make_config

from qaroma.cli import main
from qaroma.config.presets import DataFacts, resolve, validation_notes
from qaroma.config.schema import Config
from qaroma.data.split import held_out_keys
from qaroma.report.outcome import outcome
from qaroma.runs.reading import Run, read_run
from qaroma.training import fit as fit_module
from qaroma.training.finetune import finetune

GREEN, YELLOW = "\x1b[32m", "\x1b[33m"


def ended(*losses: float, why: str = "budget", steps: int | None = None, **summary: Any) -> Run:
    """A finished run with a validation at every tenth step, the first before training."""
    validations = [{"event": "validation", "step": 10 * place, "loss": loss} for place, loss in enumerate(losses)]
    last = 10 * (len(losses) - 1) if steps is None else steps
    config = {"model": {"name": "m"}, "training": {"max_steps": last}}
    return Run(
        Path("runs/x"), "x", state="finished", config=config, summary={"ended": why, "metric": "loss", **summary},
        steps=[{"step": last, "loss": 1.0}], validations=validations,
    )  # fmt: skip


def test_getting_worse_is_said_and_is_no_success() -> None:
    found = outcome(ended(1.457, 1.265, 1.38, 1.53, 1.56))
    assert found.text == (
        "the step budget is spent; the adapter is of step 10, the best by validation; the 30 steps after it brought "
        "nothing (loss 1.265 there, 1.56 at the end)"
    )
    assert not found.success


@pytest.mark.parametrize("why", ["patience", "grown", "learnt"])
def test_a_run_that_stops_by_itself_has_succeeded(why: str) -> None:
    found = outcome(ended(2.0, 1.0, 1.1, 1.2, why=why))
    assert found.success
    assert "the adapter is of step 10" in found.text
    assert "step budget" not in found.text


def test_a_run_that_still_improves_names_the_command_to_go_on() -> None:
    found = outcome(ended(3.0, 2.0, 1.5, epochs=3.0))
    assert not found.success
    assert found.text.endswith("still improving: more epochs would help")
    assert found.command == "qaroma finetune --resume --output runs/x --epochs 5"
    assert str(outcome(ended(3.0, 2.0, 1.5)).command).endswith("--max-steps 30")
    assert str(outcome(ended(3.0, 2.0, 1.5, epochs=0.5)).command).endswith("--epochs 1")
    flat = outcome(ended(3.0, 1.5, 1.49))
    assert flat.success
    assert "improving" not in flat.text


def test_a_run_without_validation_or_without_gain_is_no_success() -> None:
    assert "nothing was validated" in outcome(ended(steps=5)).text
    worse = outcome(ended(1.0, 1.2, 1.1, why="patience"))
    assert not worse.success
    assert "no validation was better than the base's loss of 1" in worse.text


@pytest.mark.parametrize(
    ("losses", "why", "verdict"),
    [
        ((2.0, 1.0, 0.999), "budget", "It was at its best when it ended"),
        ((3.0, 2.0, 1.5), "budget", "It was still improving when it ended"),
        ((1.4, 1.2, 1.5), "budget", "It was best at step 10 and got no better"),
        ((2.0, 1.0, 1.1, 1.2), "patience", "It was best at step 10, and stopped by itself"),
        ((1.0, 1.2, 1.1), "budget", "It never was better than the base"),
        ((), "budget", "It was not validated"),
    ],
)
def test_the_verdict_is_one_line(losses: tuple[float, ...], why: str, verdict: str) -> None:
    assert outcome(ended(*losses, why=why, steps=None if losses else 5)).verdict == verdict


def test_patience_follows_the_number_of_validations() -> None:
    facts = DataFacts(1000, [100], 512, validation_rows=100)

    def patience(**training: int) -> int:
        config = Config.model_validate({"model": {"name": "m"}, "training": training})
        return resolve(config, facts)[0].training.patience

    assert patience(max_steps=300, evaluate_every=30) == 3
    assert patience(max_steps=300, evaluate_every=10) == 9
    assert patience(max_steps=30, evaluate_every=6) == 2


def test_few_rows_to_validate_on_are_warned_about() -> None:
    assert "no row is validated on" in validation_notes(0)[0]
    assert "8 rows to validate on are few" in validation_notes(8)[0]
    assert validation_notes(9) == []


@pytest.mark.parametrize(("rows", "held_out"), [(63, 3), (64, 16), (320, 16), (1000, 50)])
def test_the_split_leaves_enough_to_validate_on(rows: int, held_out: int) -> None:
    assert len(held_out_keys(range(rows), share=0.05, at_most=500, seed=0)) == held_out
    assert held_out_keys(range(rows), share=0.0, at_most=500, seed=0) == set()


def test_the_end_says_so_in_colour_and_more_epochs_go_on(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 1.5, 1.6, 1.0, 0.8])
    monkeypatch.setattr(fit_module, "validation_metrics", lambda *_: {"loss": next(losses), "loss_error": 0.1})
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=200)
    run = tmp_path / "run"
    config = make_config(
        tiny_folder, data_file, run, method="lora", training__max_steps=8, training__evaluate_every=4,
        evaluation__report=False,
    )  # fmt: skip
    finetune(config, console=console)
    verdict = "the step budget is spent; the adapter is of step 4, the best by validation"
    assert f"{YELLOW}{verdict}" in out.getvalue()
    assert f"{GREEN}the step" not in out.getvalue()
    before = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert main(["finetune", "--resume", "--output", str(run), "--epochs", str(2 * before["epochs"])]) == 0
    after = read_run(run)
    assert after.step == 2 * before["steps"]
    assert outcome(after).text.count("still improving") == 1
