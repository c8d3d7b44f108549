"""`qaroma export` on a tiny model: every format, its self-test, its card, and what goes wrong in words."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import tiny_config
from export_adapters import save_random_adapter
from rich.console import Console
from test_training import make_config

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.export import formats as formats_module
from qaroma.export import shards
from qaroma.export.exporter import Options, export
from qaroma.export.selftest import SelfTest
from qaroma.export.subject import open_subject
from qaroma.inference.open import generate_from_run
from qaroma.runs.adapter import save_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.lock import LOCK
from qaroma.training.finetune import finetune

EXACT = Options(dtype="fp32", outtype="f32")
FORMATS = ("peft", "padded", "gguf-adapter", "mlx", "merged", "gguf")


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a tiny 4-bit base, with ranks from 0 to 4."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    save_random_adapter(tiny_folder, folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a generation test."""
    folder = tmp_path_factory.mktemp("runs") / "counting"
    config = make_config(
        tiny_folder, data_file, folder, training__max_steps=30, growth__eps_out=1e-9,
        evaluation={"data": str(data_file), "rows": 3}, training__evaluate_every=10,
    )  # fmt: skip
    finetune(config, console=Console(quiet=True))
    return folder


def test_what_a_killed_export_left_is_removed_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    host, dead = socket.gethostname(), 2**22 + 1  # beyond the numbers that Linux gives to processes
    owners = {
        "dead": {"pid": dead, "host": host},
        "alive": {"pid": os.getpid(), "host": host},
        "far": {"pid": dead, "host": "another"},
        "nameless": None,
    }
    left = {}
    for number, (name, owner) in enumerate(owners.items()):
        left[name] = tmp_path / f"mine.part-0123abc{number}"
        left[name].mkdir()
        if owner is not None:
            (left[name] / LOCK).write_text(json.dumps(owner))
    (tmp_path / "mine.part-notes").mkdir()
    said: list[str] = []
    export(adapter, ["peft"], output=tmp_path / "mine", options=Options(self_test=False), say=said.append)
    assert said[0] == f"{left['dead']}: removed, an export that was killed had left it"
    assert [line.split(":")[0] for line in said if "seems to be left" in line] == [
        str(left["far"]), str(left["nameless"])
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine", "mine.part-notes", *(left[name].name for name in ("alive", "far", "nameless"))
    }  # fmt: skip
    assert not (tmp_path / "mine" / LOCK).exists()


def test_all_formats_pass_and_hold_what_they_should(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = {one.format: one for one in export(run, ["all"], output=tmp_path / "out", options=EXACT, say=said.append)}
    assert tuple(found) == FORMATS
    for name, one in found.items():
        assert one.test.passed, one.test.sentence()
        assert one.test.prompts == 3  # the run's own
        assert one.test.same_answers == 3
        folder = tmp_path / "out" / name
        assert one.folder == folder
        files = {path.name for path in folder.iterdir()}
        assert {"README.md", "rank_map.svg", "tokenizer.json", "chat_template.jinja", "export.json"} <= files
        assert one.bytes >= sum(p.stat().st_size for p in folder.iterdir()) - 4096
        card = (folder / "README.md").read_text(encoding="utf-8")
        for line in (
            "base_model:", "licence: not known", "rows.jsonl", "components committed", "Validation loss:",
            "Exact match on held-out requests:", "Self-test: passed", "## How to load it", "rank_map.svg",
        ):  # fmt: skip
            assert line in card, line
        ElementTree.fromstring((folder / "rank_map.svg").read_text(encoding="utf-8"))
    assert not list((tmp_path / "out").glob("*.part"))
    used = [line.removeprefix("  use it with: ") for line in said if line.startswith("  use it with: ")]
    assert used == [one.use for one in found.values()]
    for name, words in {
        "peft": "qaroma chat", "padded": "--max-lora-rank 8 --lora-modules", "gguf-adapter": "adapter.gguf",
        "mlx": "mlx_lm.generate --model",
        "merged": "vllm serve", "gguf": "ollama create counting -f",
    }.items():  # fmt: skip
        assert words in found[name].use
        assert found[name].folder.as_posix() in found[name].use
    assert "vllm serve" in (tmp_path / "out" / "padded" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "merged" / "config.json").read_text()).get("quantization_config") is None
    assert (tmp_path / "out" / "gguf" / "Modelfile").is_file()


def test_what_is_merged_is_the_base_and_the_update(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    subject = open_subject(adapter)
    original = load_file(tiny_folder / "model.safetensors")
    options = Options(merge_into="original", dtype="fp32")
    (one,) = export(adapter, ["merged"], output=tmp_path / "out", options=options)
    assert one.test.passed
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == set(original)
    for name, tensor in merged.items():
        factors = subject.update.get(name.removesuffix(".weight"))
        wanted = original[name] if factors is None else original[name] + factors.B.T @ factors.A
        assert torch.allclose(tensor, wanted, atol=1e-6), name
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2]


def test_shards_are_one_checkpoint(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    small = partial(formats_module.write_merged, max_shard_bytes=60_000)
    monkeypatch.setattr(formats_module, "write_merged", small)
    (one,) = export(adapter, ["merged"], output=tmp_path / "out")
    assert one.test.passed
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == one.written["weights_bytes"]
    assert max(file.stat().st_size for file in files[1:]) < 70_000


def test_the_command_says_what_engines_need(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "--max-lora-rank 8" in printed
    assert "self-test passed: read by PEFT" in printed
    arguments = ["export", str(adapter), "--output", str(tmp_path / "out"), "--json", "--compress", "0.5"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)["exports"][0]
    assert told["max_lora_rank"] == 8
    assert told["self_test"]["passed"]


def test_a_compressed_adapter_has_smaller_ranks_and_says_so(adapter: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (one,) = export(adapter, ["peft"], output=tmp_path / "out", options=Options(compress=0.6), say=said.append)
    assert one.test.passed
    before = AdapterInfo.read(adapter).components
    after = AdapterInfo.read(tmp_path / "out").components
    assert sum(map(sum, after.values())) < sum(map(sum, before.values()))
    match = re.match(r"compressed: ranks sum to (\d+) instead of (\d+)", said[0])
    assert int(match[2]) == sum(map(sum, before.values()))
    assert int(match[1]) == sum(map(sum, after.values()))
    assert "Compressed: ranks sum to" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_qaroma_itself_goes_on_with_a_peft_export(adapter: Path, tmp_path: Path) -> None:
    export(adapter, ["peft"], output=tmp_path / "out", options=Options(self_test=False))
    asked = {"max_new_tokens": 8, "device": "cpu"}
    assert generate_from_run(str(tmp_path / "out"), ["count 7"], **asked) == generate_from_run(
        str(adapter), ["count 7"], **asked
    )


def test_a_checkpoint_is_exported_as_it_stands(run: Path) -> None:
    checkpoints = sorted((run / "checkpoints").iterdir())
    subject = open_subject(checkpoints[-1])
    last = open_subject(run / "adapter_last")
    assert subject.info.step == 30
    assert {name: f.rank for name, f in subject.update.items()} == {name: f.rank for name, f in last.update.items()}
    assert max(factors.rank for factors in subject.update.values()) > 1
    for name, factors in last.update.items():
        assert torch.equal(subject.update[name].A, factors.A)
        assert torch.equal(subject.update[name].B, factors.B)
    earlier = open_subject(checkpoints[0])  # with components that are still training
    assert earlier.info.step < 30
    assert any(factors.rank for factors in earlier.update.values())
    (one,) = export(checkpoints[0], ["peft"], output=run / "export-early")
    assert one.test.passed


def test_a_wrong_scale_fails_and_the_files_are_marked(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(adapter, ["padded"], output=out)
    good = (out / "adapter_config.json").read_bytes()
    plain = formats_module.write_padded

    def doubled(folder: Path, *args, **kwargs):
        told = plain(folder, *args, **kwargs)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
        return told

    monkeypatch.setattr(formats_module, "write_padded", doubled)
    with pytest.raises(QaromaError, match=r"padded: self-test FAILED: read by PEFT, largest difference.*out\.failed"):
        export(adapter, ["padded"], output=out)
    assert (out / "adapter_config.json").read_bytes() == good  # the earlier export stands
    failed = tmp_path / "out.failed"
    assert json.loads((failed / "export.json").read_text())["self_test"]["passed"] is False
    assert "Self-test: FAILED" in (failed / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize(
    ("kind", "factor", "outtype"),
    [("merged", 2.0, "f16"), ("merged", 0.5, "f16"), ("gguf", 2.0, "q8_0"), ("gguf", 2.0, "q4_k_m")],
)
def test_a_merge_of_a_wrong_scale_fails_even_in_few_bits(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, factor: float, outtype: str
) -> None:
    from qaroma.export import gguf_model, merged
    from qaroma.export.weights import merged_tensors
    from qaroma.method.factors import Factors

    def wrong(tensors, update):
        return merged_tensors(tensors, {name: Factors(f.A, f.B * factor) for name, f in update.items()})

    monkeypatch.setattr(merged if kind == "merged" else gguf_model, "merged_tensors", wrong)
    with pytest.raises(QaromaError, match=r"self-test FAILED.* \d+\.\d % of the update") as error:
        export(adapter, [kind], output=tmp_path / "out", options=Options(outtype=outtype))
    told = float(re.search(r"([\d.]+) % of the update", str(error.value))[1])
    assert told == pytest.approx(100 * factor, abs=5)  # less what chance leaves of rounding


def test_without_peft_its_rules_are_applied_instead(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats_module, "installed", lambda package: False)
    said: list[str] = []
    for one in export(adapter, ["peft", "padded", "gguf"], output=tmp_path, options=EXACT, say=said.append):
        assert one.test.passed
    assert any("PEFT's rules in plain torch (peft is not installed)" in line for line in said)
    assert any("transformers' GGUF reader" in line for line in said)


def another_base(folder: Path, tokenizer, **changes) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(5)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_base_is_refused_before_anything_is_written(adapter: Path, tmp_path: Path, tokenizer) -> None:
    out = tmp_path / "out"
    for name, changes, words in (
        ("other", {}, "is another model .*--base"),
        ("wide", {"intermediate_size": 192}, "this model's is 192 x 64; give the base"),
        ("flat", {"num_hidden_layers": 1}, "which this model does not have"),
    ):
        base = another_base(tmp_path / name, tokenizer, **changes)
        with pytest.raises(QaromaError, match=words):
            export(adapter, ["merged"], output=out, base=str(base))
        assert not out.exists()
    assert main(["export", str(adapter), "--base", str(tmp_path / "wide"), "--output", str(out)]) == 2


def test_a_full_disk_leaves_nothing_behind(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_raw", full)
    with pytest.raises(QaromaError, match=r"cannot write to .*out \(the disk is full\); free some room, or choose"):
        export(adapter, ["merged"], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(adapter: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(QaromaError, match="exists and is no earlier export; choose another --output"):
        export(adapter, ["peft"], output=mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    for _ in range(2):
        export(adapter, ["peft"], output=tmp_path / "out", options=Options(self_test=False))


def test_what_is_no_run_is_said_in_words(adapter: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(QaromaError, match="neither a run, nor a checkpoint in one, nor an adapter folder"):
        export(tmp_path, ["peft"])
    with pytest.raises(QaromaError, match=r"got the format 'onnx'; expected peft, padded, .* or all"):
        export(adapter, ["onnx"])
    torn = tmp_path / "counting"
    shutil.copytree(run, torn)
    checkpoint = sorted((torn / "checkpoints").iterdir())[-1]
    (checkpoint / "state.safetensors").write_bytes(b"1234")
    with pytest.raises(QaromaError, match=r"is damaged .*; name another checkpoint"):
        export(checkpoint, ["peft"])
    shutil.rmtree(torn / "adapter")
    with pytest.raises(QaromaError, match="has no adapter yet; finish it with: qaroma finetune --resume"):
        export(torn, ["peft"])


def test_a_base_that_gguf_has_no_names_for(tmp_path: Path, tokenizer) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(6)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    save_random_adapter(tmp_path / "neox", tmp_path / "adapter")
    with pytest.raises(QaromaError, match="architecture 'gpt_neox', which GGUF exports do not cover"):
        export(tmp_path / "adapter", ["gguf-adapter"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    found = export(tmp_path / "adapter", ["all"], output=tmp_path / "out", options=EXACT, say=said.append)
    assert [one.format for one in found] == ["peft", "padded", "merged"]
    assert all(one.test.passed for one in found)
    assert sum("left out, since" in line for line in said) == 3


def test_values_that_half_precision_cannot_hold(adapter: Path, tmp_path: Path) -> None:
    subject = open_subject(adapter)
    from qaroma.method.attach import attach_update
    from qaroma.model.base import load_base

    model = load_base(subject.base.name, compute_dtype=torch.float32, device="cpu")
    big = attach_update(model, subject.update)
    next(layer for layer in big.layers.values() if layer.rank).B.fill_(1e6)
    save_adapter(big, tmp_path / "big", info=subject.info)
    with pytest.raises(QaromaError, match=r"has values that torch\.float16 cannot hold; type --dtype bf16"):
        export(tmp_path / "big", ["merged"], output=tmp_path / "out", options=Options(dtype="fp16"))
    assert not (tmp_path / "out").exists()


def test_a_self_test_passes_by_both_of_its_measures() -> None:
    good = SelfTest("e", "logits", 1e-4, 1e-3, 3, 3, share=0.9)
    assert good.passed
    assert not SelfTest("e", "logits", 1e-2, 1e-3, 3, 3).passed
    assert not SelfTest("e", "logits", 1e-4, 1e-3, 3, 3, share=0.5).passed
    assert not SelfTest("e", "logits", float("inf"), 1e-3, 0, 3).passed
    assert "90.0 % of the update" in good.sentence()
