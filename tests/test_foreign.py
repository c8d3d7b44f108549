"""Configurations of other tools: what can be done is taken, the rest is named, and what trains otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.plan.other_tools import read_foreign

AXOLOTL = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "trust_remote_code": True,
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "learning_rate": 0.0002,
    "datasets": [
        {"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca", "name": "main", "split": "train[:10%]", "shards": 2}
    ],
    "val_set_size": 0.1,
    "sample_packing": True,
    "num_epochs": 2,
    "max_steps": -1,
    "train_on_inputs": False,
    "wandb_project": "mine",
    "seed": 7,
}
LLAMA_FACTORY = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "mine, theirs",
    "template": "llama3",
    "cutoff_len": 2048,
    "num_train_epochs": 3.0,
    "val_size": 0.05,
    "report_to": "none",
}
INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "query": "about", "response": "a"}},
    "theirs": {
        "hf_hub_url": "me/data",
        "subset": "main",
        "split": "test",
        "columns": {"prompt": "q", "query": "about", "response": "a"},
    },
    "pairs": {"file_name": "pairs.json", "ranking": True},
}


def _write(folder: Path, values: dict, info: dict | None = None) -> str:
    path = folder / "theirs.yaml"
    if info is not None:
        (folder / "data").mkdir()
        (folder / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        values = values | {"dataset_dir": str(folder / "data")}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(path)


def test_axolotl(tmp_path: Path) -> None:
    found = read_foreign(_write(tmp_path, AXOLOTL))
    assert found.settings == {
        "model.name": "NousResearch/Llama-3.2-1B",
        "training.epochs": 2,
        "training.seed": 7,
        "data.packing": True,
        "data.train": ["teknium/GPT4-LLM-Cleaned:main@train[:10%]"],
        "data.validation_share": 0.1,
        "training.track": ["wandb"],
    }
    assert set(found.left) == {
        "datasets: shards", "trust_remote_code", "load_in_4bit", "adapter", "lora_r", "learning_rate"
    }  # fmt: skip


def test_axolotls_own_fields(tmp_path: Path) -> None:
    kind = {"field_instruction": "q", "field_output": "a", "field_system": "s", "format": "[INST] {instruction}"}
    values = AXOLOTL | {"datasets": [{"path": "json", "data_files": ["mine.jsonl"], "type": kind}]}
    found = read_foreign(_write(tmp_path, values))
    assert found.settings["data.train"] == ["mine.jsonl"]
    assert found.settings["data.columns"] == {"prompt": "q", "completion": "a", "system": "s"}
    assert "datasets: format" in found.left


def test_llama_factory(tmp_path: Path) -> None:
    found = read_foreign(_write(tmp_path, LLAMA_FACTORY, INFO))
    assert found.settings == {
        "model.name": "meta-llama/Meta-Llama-3-8B-Instruct",
        "training.epochs": 3.0,
        "data.train": [str(tmp_path / "data" / "mine.json"), "me/data:main@test"],
        "data.columns": {"prompt": "q", "context": "about", "completion": "a"},
        "data.validation_share": 0.05,
    }
    assert found.left == ["finetuning_type", "template", "cutoff_len"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (AXOLOTL | {"rl": "dpo"}, "asks for rl: dpo; expected plain training"),
        (AXOLOTL | {"datasets": None}, "has no list of datasets"),
        (LLAMA_FACTORY | {"stage": "kto"}, "asks for stage: kto; expected sft or pt"),
        (LLAMA_FACTORY | {"dataset": "nowhere"}, "has no data set 'nowhere'"),
        (LLAMA_FACTORY | {"dataset": "pairs"}, "'pairs' .* holds preferences"),
        ({"model": {"name": "x"}}, "no configuration of Axolotl"),
    ],
)
def test_what_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(QaromaError, match=message):
        read_foreign(_write(tmp_path, values, INFO))


def test_init_begins_with_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"say {n}", "a": str(n), "note": "x"} for n in range(20)]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    kind = {"field_instruction": "q", "field_output": "a"}
    values = AXOLOTL | {"base_model": str(tiny_folder), "datasets": [{"path": "mine.jsonl", "type": kind}]}
    assert main(["init", "--from", _write(tmp_path, values), "--vram", "8GiB", "--output", "ours.yaml", "--yes"]) == 0
    out = capsys.readouterr().out
    assert (
        "of the Axolotl configuration not taken: trust_remote_code, load_in_4bit, adapter, lora_r, learning_rate" in out
    )
    assert "ignored keys: note" in out
    written = yaml.safe_load(Path("ours.yaml").read_text(encoding="utf-8"))
    assert written["data"]["columns"] == {"prompt": "q", "completion": "a"}
    assert (written["training"]["epochs"], written["training"]["seed"]) == (2, 7)
    assert written["data"]["packing"] is True
