"""A base that brings Python code of its own: whoever opens it types --trust-remote-code, in every command."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.export.card import lines_for_peft
from qaroma.inference.open import remembered_base
from qaroma.runs.adapter_info import AdapterInfo

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TRUST = "--trust-remote-code"


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama under a name that transformers does not know, with the code that does."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "own"
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "own"
    arguments = ["finetune", "--model", str(base), "--data", str(data_file), "--output", str(folder), TRUST]
    assert main([*arguments, "--max-steps", "4", "--device", "cpu", "--set", "evaluation.report=false"]) == 0
    return folder


def test_what_the_run_remembers(run: Path) -> None:
    info = AdapterInfo.read(run / "adapter")
    assert info.base is not None
    assert info.base.needs_remote_code
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["trust_remote_code"] is True  # and is no consent
    with pytest.raises(QaromaError, match=r"brings Python code of its own.*then add: --trust-remote-code"):
        remembered_base(info, run)
    assert any("trust_remote_code=True" in line for line in lines_for_peft(info, "org/own", "me/x"))


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "RUN", "count 7", "--max-new-tokens", "2"],
        ["evaluate", "RUN", "--data", "DATA", "--rows", "2", "--max-new-tokens", "2"],
        ["chat", "RUN", "--max-new-tokens", "2"],
        ["export", "RUN", "--format", "padded", "--output", "OUT"],
        ["export", "RUN", "--format", "merged", "--output", "OUT"],
    ],
    ids=lambda command: "-".join(command[:1] + command[3:4]),
)
def test_every_command_takes_the_flag_and_needs_it(
    run: Path, data_file: Path, tmp_path: Path, command: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"RUN": str(run), "DATA": str(data_file), "OUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in command] + ["--device", "cpu"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(arguments) == 2
    assert TRUST in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, TRUST]) == 0
    if "merged" in command:
        assert (tmp_path / "out" / "modeling_own.py").read_text() == CODE


def test_a_run_goes_on_only_with_consent(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    arguments = ["finetune", "--resume", "--output", str(again), "--max-steps", "6"]
    assert main(arguments) == 2
    assert f"--resume --output {again.as_posix()} {TRUST}" in capsys.readouterr().err
    assert main([*arguments, TRUST]) == 0
