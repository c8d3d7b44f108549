"""Models and adapters from elsewhere: pickles, files outside the folder, expressions without end, tokens in answers."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from export_adapters import save_random_adapter
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen2Config, conversion_mapping

from qaroma.errors import QaromaError
from qaroma.export.exporter import Options, export
from qaroma.export.gguf_model import context_length
from qaroma.export.hub_failures import explained
from qaroma.export.weights import original_tensors
from qaroma.method.attach import linear_shapes
from qaroma.method.factors import Factors
from qaroma.model.base import load_base, load_tokenizer
from qaroma.model.failures import without_token
from qaroma.model.found import find_model
from qaroma.runs.adapter import read_adapter, write_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.peft_limits import lost_in_peft, told_of_peft
from qaroma.runs.peft_lora import read_lora
from qaroma.text.patterns import Patterns


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    save_random_adapter(tiny_folder, tmp_path / "adapter", quantization="none")
    return tmp_path / "adapter"


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_weights_in_a_pickle_are_not_opened(base: Path) -> None:
    weights = base / "model.safetensors"
    torch.save({}, base / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(QaromaError, match=r"in a pickle .* convert it once: python -c .* then: --model converted"):
        load_base(base, device="cpu")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "C:\\outside.safetensors", 1])
def test_an_index_that_leaves_the_folder_is_refused(base: Path, name: object) -> None:
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(QaromaError, match="outside its folder"):
        load_base(base, device="cpu")
    with pytest.raises(QaromaError, match="outside its folder"):
        original_tensors(base, AutoConfig.from_pretrained(base))


def test_a_revision_stays_in_the_hubs_cache(adapter: Path) -> None:
    with pytest.raises(QaromaError, match="expected a branch, tag or commit"):
        find_model("org/model", revision="../../x")
    held = json.loads((adapter / "growth.json").read_text())["base"]
    changed(adapter / "growth.json", base={**held, "revision": "../../x"})
    with pytest.raises(QaromaError, match=r"growth.json is damaged \(base.revision"):
        AdapterInfo.read(adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"components": {"a": [10**9]}}, {"components": {"a": [-1]}}, {"components": []}, {"components": {"a": "x"}},
        {"alpha": float("nan")}, {"alpha": 0}, {"inner_rank": "x"}, {"base": {"name": 1}}, {"base": []}, {"task": "x"},
        {"labels": 1}, {"max_length": 0}, {"template": "x"}, {"step": 10**40}, {"version": "x"}, {"version": None},
        {"head": [""]}, {"settings": 1},
    ],
)  # fmt: skip
def test_an_adapter_that_remembers_nonsense_is_damaged(adapter: Path, values: dict[str, Any]) -> None:
    changed(adapter / "growth.json", **values)
    with pytest.raises(QaromaError, match=r"growth.json is damaged \(.+\); copy the adapter again"):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["[]", "1", "{", "[" * 3000 + "]" * 3000, '{"version": 2}', "\x00"])
@pytest.mark.parametrize("name", ["growth.json", "adapter_config.json"])
def test_a_file_that_holds_no_adapter(adapter: Path, text: str, name: str) -> None:
    (adapter / name).write_text(text)
    with pytest.raises(QaromaError):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": "x"}, {"lora_alpha": None}, {"lora_alpha": float("nan")}, {"alpha_pattern": [1]},
        {"alpha_pattern": {"a": "x"}}, {"modules_to_save": 1}, {"modules_to_save": [[1]]}, {"peft_type": 1},
    ],
)  # fmt: skip
def test_a_lora_with_settings_of_another_kind(adapter: Path, values: dict[str, Any]) -> None:
    changed(adapter / "adapter_config.json", **values)
    with pytest.raises(QaromaError):
        read_lora(adapter)


def test_an_expression_in_alpha_pattern_has_an_end(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Patterns.__init__.__kwdefaults__, "seconds", 0.02)
    changed(adapter / "adapter_config.json", alpha_pattern={r"(\w|\w\w|\.)+(?<!\w)": 4})
    began = time.process_time()
    with pytest.raises(QaromaError, match="takes too long to match"):
        read_lora(adapter)
    assert time.process_time() - began < 5


def test_alphas_are_found_by_name_and_by_expression(adapter: Path) -> None:
    plain, _ = read_lora(adapter)
    ranks = {name: factors.rank for name, factors in plain.items()}
    first = next(iter(ranks))
    changed(adapter / "adapter_config.json", lora_alpha=1, alpha_pattern={first: 3, r".*down_proj": 5, "up_proj": 7})
    for name, factors in read_lora(adapter)[0].items():
        alpha = 3 if name == first else 5 if name.endswith("down_proj") else 7 if name.endswith("up_proj") else 1
        assert torch.allclose(factors.B, plain[name].B * alpha / ranks[name])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_weights_have_the_rights_of_all_other_files(adapter: Path) -> None:
    rights = {stat.S_IMODE(file.stat().st_mode) for file in adapter.iterdir()}
    assert rights == {0o666 & adapter.stat().st_mode}


def test_a_token_is_taken_out_of_what_a_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    said = without_token("bad token secret-of-mine, hf_abcdefghijkl, Authorization: Bearer xyz")
    assert said == "bad token (token), (token), Authorization: Bearer (token)"


def test_a_hub_that_answers_without_json() -> None:
    with pytest.raises(QaromaError, match=r"no JSON.*HF_ENDPOINT"), explained("me/x"):
        json.loads("<html>")


def test_damaged_small_files_of_a_base(base: Path) -> None:
    whole = (base / "config.json").read_text()
    for values in ({"rope_parameters": 1}, {"num_hidden_layers": "x"}, {"vocab_size": None}, {"model_type": []}):
        changed(base / "config.json", **values)
        with pytest.raises(QaromaError):
            find_model(base)
        (base / "config.json").write_text(whole)
    for text in ("{}", "[]", "[" * 3000 + "]" * 3000, '{"model": {"type": "BPE"}}'):
        (base / "tokenizer.json").write_text(text)
        with pytest.raises(QaromaError):
            load_tokenizer(base)


def test_a_gguf_file_cut_anywhere_is_told(tmp_path: Path) -> None:
    from fuzzing import _gguf

    whole = _gguf()
    for length in (0, 3, 8, 23, 24, 60, 200, 400, len(whole) - 200):
        (tmp_path / "a.gguf").write_bytes(whole[:length])
        with pytest.raises(QaromaError, match=r"GGUF file of|damaged"):
            find_model(tmp_path / "a.gguf")


def test_a_gguf_model_ends_at_the_bases_sliding_window() -> None:
    assert context_length(MistralConfig(max_position_embeddings=512, sliding_window=256)) == 256
    assert context_length(MistralConfig(max_position_embeddings=512, sliding_window=None)) == 512
    assert context_length(Qwen2Config(max_position_embeddings=512, sliding_window=256)) == 512
    sliding = Qwen2Config(
        max_position_embeddings=512,
        sliding_window=256,
        use_sliding_window=True,
        max_window_layers=0,
        num_hidden_layers=2,
    )
    assert context_length(sliding) == 256


def test_a_merge_keeps_what_the_base_stops_at_and_samples_by(adapter: Path, base: Path, tmp_path: Path) -> None:
    settings = {"eos_token_id": [1, 7], "do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps(settings))
    export(adapter, ["merged"], base=str(base), output=tmp_path / "out", options=Options(dtype="fp32"))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 2, 7]
    assert {name: written[name] for name in ("temperature", "top_p", "repetition_penalty")} == {
        "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1,
    }  # fmt: skip


STANDARD: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]},
    "qwen3_next": {
        **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
        "n_group": 1,
        "num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 12,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8,
    },
}  # fmt: skip


def test_what_peft_refuses_is_known_before(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    mixer = "backbone.layers.0.mixer"
    for names, refused in (([f"{mixer}.in_proj"], False), ([f"{mixer}.in_proj", f"{mixer}.out_proj"], True)):
        shapes = {name: shape for name, shape in linear_shapes(model).items() if name in names}
        update = {
            name: Factors(torch.randn(2, columns), torch.randn(2, rows)) for name, (rows, columns) in shapes.items()
        }
        folder = tmp_path / str(refused)
        write_adapter(folder, update, AdapterInfo({name: [2] for name in shapes}, 2, 2.0), base="x")
        assert ("PEFT refuses an adapter of this base" in str(told_of_peft(config, names))) == refused
        with pytest.raises(ValueError, match="incompatible") if refused else nullcontext():
            peft.PeftModel.from_pretrained(model, str(folder)).unload()


def test_a_lora_of_transposed_layers_is_read_as_any(adapter: Path) -> None:
    """PEFT writes fan_in_fan_out for GPT-2's layers; A and B mean the same."""
    plain = read_lora(adapter)[0]
    changed(adapter / "adapter_config.json", fan_in_fan_out=True)
    for name, factors in read_lora(adapter)[0].items():
        assert torch.equal(factors.A, plain[name].A)
        assert torch.equal(factors.B, plain[name].B)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_leaves_out_is_known_before(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = AutoConfig.for_model(family, **{**STANDARD, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config)
    shapes = {name: shape for name, shape in linear_shapes(model).items() if name != "lm_head"}
    update = {name: Factors(torch.randn(2, n), torch.randn(2, m)) for name, (m, n) in shapes.items()}
    write_adapter(tmp_path / "a", update, AdapterInfo({name: [2] for name in shapes}, 2, 2.0), base="x")
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).state_dict()
    keys = {name: f"base_model.model.{name}.lora_B.default.weight" for name in shapes}
    lost = [name for name, key in keys.items() if key not in loaded or not torch.equal(loaded[key], update[name].B.T)]
    assert lost_in_peft(config, shapes) == lost
    assert (told_of_peft(config, shapes) is not None) == bool(lost)
    losing = {"qwen3_moe", "qwen3_next", "deepseek_v3"}
    if "qwen2_moe" in conversion_mapping._MODEL_TO_CONVERSION_PATTERN:  # as in transformers 5.4
        losing.add("qwen2_moe")
    assert bool(lost) == (family in losing)
