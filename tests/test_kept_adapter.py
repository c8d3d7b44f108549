"""What a run says of its adapter is of the adapter that it saves: of one that was trimmed, after that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_labelled
import test_training
from rich.console import Console

from qaroma.cli import main
from qaroma.config.schema import Config
from qaroma.export import push
from qaroma.export.card import UNKNOWN
from qaroma.export.exporter import Options, export
from qaroma.inference.open import evaluate_run
from qaroma.report.keyfigures import validation_table
from qaroma.report.panels import learning_panel
from qaroma.runs.adapter import read_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.figures import figures_of
from qaroma.runs.reading import read_run
from qaroma.training import trimming
from qaroma.training.finetune import finetune

GROWTH = {"start_rank": 4, "max_rank": 4, "trim": 0.6}


@pytest.fixture(autouse=True)
def _all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trimming that changes the figures is taken too."""
    monkeypatch.setattr(trimming, "WORSE", 1e9)


def trained(config: Config, **again: Any) -> tuple[dict[str, Any], str]:
    """The figures of a run, and its screen."""
    console = Console(record=True, width=200, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    return finetune(config, console=console, **again), console.export_text()


def card_of(run: Path) -> str:
    """The model card that goes to the hub."""
    info = AdapterInfo.read(run / "adapter")
    return bytes(push._files(run / "adapter", info, "me/x", None, UNKNOWN)["README.md"]).decode()


def assert_all_of_the_saved(
    run: Path, rows: Path, figures: dict[str, Any], screen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The screen, the summary, the page, the tables and the card say what the adapter on the disk scores."""
    metric, step = figures["metric"], figures["best_step"]
    truth = evaluate_run(str(run), [(str(rows), 1.0)])
    assert figures["validation_loss"] == pytest.approx(truth["loss"], abs=1e-4)
    assert figures["metric_best"] == pytest.approx(truth[metric], abs=1e-4)
    logged = [line for line in test_training.records(run, "validation") if line["step"] == step]
    assert abs(logged[0]["loss"] - truth["loss"]) > 1e-2  # trimming changed it

    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == figures
    loss, best = f"{figures['validation_loss']:.4g}", f"{figures['metric_best']:.4g}"
    assert f"{figures['validation_loss_before']:.4g} before, {loss} after" in screen
    assert f"{figures['metric_before']:.4g} before, {best} after" in screen
    assert validation_table(read_run(run))[1][-1][0] == f"{step}, trimmed"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{best} at step {step}" in page
    assert f"{loss} at step {step}" in page
    assert f"{logged[0]['loss']:.4g} at step" not in page
    assert learning_panel(read_run(run)).kept == (step, figures["metric_best"])
    capsys.readouterr()
    assert main(["runs", str(run)]) == 0
    assert f"{metric} {best} at {step}" in capsys.readouterr().out
    assert main(["runs", str(run), "--json"]) == 0
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["runs"][0]["validation"]}
    assert (told["loss"]["best"], told[metric]["best"]) == (figures["validation_loss"], figures["metric_best"])
    card = card_of(run)
    assert f"Validation loss: {figures['validation_loss_before']:.4g} before, {loss} after\n" in card
    assert f"Validation {metric}: {figures['metric_before']:.4g} before, {best} after\n" in card
    held = sum(factors.A.numel() + factors.B.numel() for factors in read_adapter(run / "adapter").update.values())
    held += sum(tensor.numel() for tensor in read_adapter(run / "adapter").head.values())
    assert figures["trainable_parameters_end"] > held == figures_of(read_run(run)).adapter_parameters
    most = figures["trainable_parameters_end"]
    assert f"- Parameters: {held:,} in the adapter, at most {most:,} trained together\n" in card


@pytest.mark.parametrize("labels", [False, True])
def test_all_places_say_what_the_saved_adapter_scores(
    labels: bool, tiny_folder: Path, data_file: Path, encoder_folder: Path, pairs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, rows = tmp_path / "run", pairs / "dev.jsonl" if labels else data_file
    changes = {"growth": GROWTH, "evaluation": {"report": True}, "data__validation": str(rows)}
    if labels:
        config = test_labelled.make_config(encoder_folder, pairs, run, **changes)
    else:
        config = test_training.make_config(tiny_folder, data_file, run, training__evaluate_every=5, **changes)
    figures, screen = trained(config)
    assert_all_of_the_saved(run, rows, figures, screen, capsys)

    again, screen = trained(Config.model_validate({"output": str(run)}), resume=True)
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    assert_all_of_the_saved(run, rows, again, screen, capsys)

    more = figures["steps"] + 4
    longer = Config.model_validate({"output": str(run), "training": {"max_steps": more}})
    figures, screen = trained(longer, resume=True)
    assert figures["steps"] == more
    assert_all_of_the_saved(run, rows, figures, screen, capsys)


def test_a_run_that_goes_on_after_trimming_says_what_its_adapter_is_until_then(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter that lies there while it trains on is the untrimmed one again, and so are its figures."""
    run = tmp_path / "run"
    config = test_training.make_config(
        tiny_folder, data_file, run, growth=GROWTH, data__validation=str(data_file), training__evaluate_every=5
    )
    finetune(config, console=Console(quiet=True))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qaroma.training.finetune.fit", killed)
    longer = Config.model_validate({"output": str(run), "training": {"max_steps": 24}})
    with pytest.raises(KeyboardInterrupt):
        finetune(longer, resume=True, console=Console(quiet=True))
    told = figures_of(read_run(run)).of("loss")
    logged = {line["step"]: line["loss"] for line in test_training.records(run, "validation")}
    assert told is not None
    assert told.best == logged[told.best_step]


def test_the_card_of_a_checkpoint_is_of_that_checkpoint(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = test_training.make_config(
        tiny_folder, data_file, run, growth=GROWTH, data__validation=str(data_file), training__evaluate_every=5,
        evaluation={"data": str(data_file), "rows": 3, "report": False}, checkpoint={"every": 5, "keep": 4},
    )  # fmt: skip
    finetune(config, console=Console(quiet=True))
    logged = {line["step"]: line["loss"] for line in test_training.records(run, "validation")}
    checkpoint = run / "checkpoints" / "step-00000010"
    export(checkpoint, ["peft"], output=tmp_path / "out", options=Options(self_test=False))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"Validation loss: {logged[0]:.4g} before, {logged[10]:.4g} after\n" in card
    assert "10 steps; this adapter is of step 10\n" in card
    assert re.search(r"requests: [\d.]+ % before\n", card)
    held = test_training.records(run)[9]["trainable_parameters"]
    assert f"- Parameters: {held:,} in the adapter\n" in card
