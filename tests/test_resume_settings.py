"""What a run goes on with that an older version began."""

from __future__ import annotations

from pathlib import Path

from qaroma.config.load import read_settings
from qaroma.training.resume import resumed_config


def test_a_run_that_names_no_optimizer_goes_on_with_the_one_it_had(tmp_path: Path) -> None:
    """0.4.0 had AdamW alone; what auto decides today would change the method in mid-run."""
    run = tmp_path / "run"
    run.mkdir()
    text = "model: {name: base}\ndata: {train: [{path: rows.jsonl}]}\n"
    (run / "config.yaml").write_text(text, encoding="utf-8")
    assert resumed_config(read_settings(None, {"output": str(run)}, [])).training.optimizer == "adamw"
    (run / "config.yaml").write_text(f"{text}training: {{optimizer: muon}}\n", encoding="utf-8")
    assert resumed_config(read_settings(None, {"output": str(run)}, [])).training.optimizer == "muon"
