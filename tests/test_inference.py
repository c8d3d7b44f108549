"""`generate` and `evaluate` on what a run left, through the command line's functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from test_training import make_config

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.inference.open import adapter_folder, evaluate_run, open_run
from qaroma.training.finetune import finetune


@pytest.fixture(scope="module")
def run(tiny_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = make_config(tiny_folder, data_file, folder, training__max_steps=60)
    finetune(config, console=Console(quiet=True))
    return folder


def test_evaluate_gives_the_runs_own_validation_loss(
    run: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--data", str(data_file), "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"rows", "loss", "loss_error", "perplexity", "tokens", "exact_match"}
    assert figures["rows"] == 60
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = min(r["loss"] for r in records if r.get("event") == "validation")
    assert figures["loss"] == pytest.approx(validation, abs=0.5)  # other rows, the same task
    assert 0 <= figures["exact_match"] <= 1


def test_generate_answers_each_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "count 7 ", "count 8 x", "--json", "--device", "cpu"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [a["prompt"] for a in answers] == ["count 7 ", "count 8 x"]
    assert all(isinstance(a["answer"], str) for a in answers)


def test_a_run_an_adapter_and_nothing(run: Path, tmp_path: Path) -> None:
    assert adapter_folder(run) == run / "adapter"
    assert adapter_folder(run / "adapter_last") == run / "adapter_last"
    with pytest.raises(QaromaError, match="neither a run nor an adapter folder"):
        adapter_folder(tmp_path)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    with pytest.raises(QaromaError, match="has no adapter yet; finish it with: qaroma finetune --resume"):
        adapter_folder(unfinished)


def test_another_base_is_recognised_by_its_fingerprint(run: Path, tmp_path: Path, tokenizer, data_file: Path) -> None:
    import torch
    from conftest import tiny_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(99)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(QaromaError, match=r"is another model .*--base"):
        open_run(run, base=str(tmp_path / "other"), device="cpu")
    assert main(["evaluate", str(run), "--data", str(data_file), "--base", str(tmp_path / "other")]) == 2


def test_plain_text_has_a_loss_and_no_exact_match(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("growth grows a component at a time. " * 20, encoding="utf-8")
    figures = evaluate_run(str(run), [(str(text), 1.0)], device="cpu")
    assert figures["tokens"] > 50
    assert "exact_match" not in figures


@pytest.mark.parametrize(("quantization", "double"), [("nf4", False), ("fp4", True), ("none", True)])
def test_a_packed_head_is_remembered_as_it_was(
    tiny_folder: Path, data_file: Path, tmp_path: Path, quantization: str, double: bool
) -> None:
    """Memory level 3: whoever opens the run gets the very head that it was trained with."""
    folder = tmp_path / "run"
    config = make_config(tiny_folder, data_file, folder, training__max_steps=3, training__memory=3)
    config.model.quantization, config.model.double_quantization = quantization, double
    finetune(config, console=Console(quiet=True))
    growth = json.loads((folder / "adapter_last" / "growth.json").read_text())
    expected = "nf4" if quantization == "none" else quantization
    assert growth["base"]["head_quantization"] == expected
    state = open_run(folder, device="cpu").model.get_output_embeddings().weight.quant_state
    assert (state.quant_type, state.nested) == (expected, double)
