"""Updates as plain factors: taken off and put on, compressed, padded, read by PEFT's rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from export_adapters import random_update
from safetensors.torch import load_file, save_file

from qaroma.errors import QaromaError
from qaroma.export.compress import compress, compress_factors
from qaroma.export.padded import RANKS, padded_rank, write_padded
from qaroma.method.attach import attach_update, check_shapes, detach, linear_shapes
from qaroma.method.factors import Factors
from qaroma.runs.peft_lora import lora_config, read_lora, write_lora

IDS = torch.arange(3, 40)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_update_comes_off_and_goes_on(tiny_model) -> None:
    bare = logits(tiny_model)
    update = random_update(linear_shapes(tiny_model), size=0.5)
    adapter = attach_update(tiny_model, update)
    tuned = logits(tiny_model)
    assert (tuned - bare).abs().max() > 0.1
    again = adapter.factors()
    assert list(again) == list(update)
    for name, factors in update.items():
        assert torch.equal(again[name].A, factors.A)
        assert torch.equal(again[name].B, factors.B)
    detach(adapter)
    assert torch.equal(logits(tiny_model), bare)
    assert not any("base" in name for name, _ in tiny_model.named_modules())


def test_shapes_of_another_model_are_refused_in_words(tiny_model) -> None:
    from transformers import LlamaForCausalLM

    update = random_update(linear_shapes(tiny_model))
    check_shapes(update, linear_shapes(tiny_model), "a")
    with pytest.raises(QaromaError, match=r"a has .*gate_proj of 128 x 64, this model's is 192 x 64; give the base"):
        check_shapes(update, linear_shapes(LlamaForCausalLM(tiny_config(intermediate_size=192))), "a")
    with pytest.raises(QaromaError, match=r"a adapts model\.layers\.1\..* which this model does not have"):
        check_shapes(update, linear_shapes(LlamaForCausalLM(tiny_config(num_hidden_layers=1))), "a")


@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 64, 7), (8, 50, 20), (64, 64, 1)])
@pytest.mark.parametrize("error", [0.0, 0.05, 0.3])
def test_compressing_is_truncating_the_svd_of_the_product(rows: int, columns: int, rank: int, error: float) -> None:
    factors = Factors(torch.randn(rank, columns), torch.randn(rank, rows) * torch.logspace(0, -3, rank)[:, None])
    dense = factors.B.double().T @ factors.A.double()
    U, values, V = torch.linalg.svd(dense, full_matrices=False)
    kept = next(k for k in range(len(values) + 1) if values[k:].norm() <= max(error, 1e-7) * values.norm())
    found, reached = compress_factors(factors, error)
    assert found.rank == kept
    best = (U[:, :kept] * values[:kept]) @ V[:kept]
    assert torch.allclose(found.B.double().T @ found.A.double(), best, atol=1e-5 * float(values[0]))
    assert reached == pytest.approx(float(values[kept:].norm() / values.norm()), abs=1e-6)
    assert reached <= max(error, 1e-7)


def test_repeated_and_empty_directions_go_without_any_error() -> None:
    A, B = torch.randn(2, 40), torch.randn(2, 30)
    twice = Factors(torch.cat([A, 2 * A]), torch.cat([B, -B]))
    nothing = Factors(torch.randn(3, 40), torch.zeros(3, 30))
    update = {"one": twice, "two": nothing, "three": Factors.zero((30, 40))}
    found, told = compress(update, 0.0)
    assert {name: factors.rank for name, factors in found.items()} == {"one": 2, "two": 0, "three": 0}
    assert (told.before, told.after, told.largest_before, told.largest_after) == (7, 2, 4, 2)
    assert torch.allclose(found["one"].B.T @ found["one"].A, -B.T @ A, atol=1e-4)


def test_one_of_the_engines_ranks_is_chosen() -> None:
    assert [padded_rank(n) for n in (0, 1, 8, 9, 33, 256)] == [8, 8, 8, 16, 64, 256]
    with pytest.raises(QaromaError, match=r"largest rank is 257.*at most 256; .*--compress"):
        padded_rank(257)


def read_as_vllm(folder: Path, modules: set[str], max_lora_rank: int) -> dict[str, torch.Tensor]:
    """A LoRA as vLLM documents it: module -> the matrix that is added to its weight.

    Its rules, each of them an error here: r, lora_alpha and target_modules must be there, r an integer
    of at most max_lora_rank; modules_to_save and DoRA are not supported; patterns are not read; the
    scale is lora_alpha / r for every module; a tensor's name ends in lora_A.weight or lora_B.weight and
    the module before it in one that the model has; tensors of every module have rank r.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert config["r"] <= max_lora_rank
    assert config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["bias"] == "none"
    assert config["target_modules"]
    assert all(name.split(".")[-1] in modules for name in config["target_modules"])
    scale = config["lora_alpha"] / config["r"]
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.removeprefix("base_model.model.").split(".")
        assert name.startswith("base_model.model.")
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        assert parts[-3] in modules
        assert tensor.shape[0 if parts[-2] == "lora_A" else 1] == config["r"]
        pairs.setdefault(".".join(parts[:-2]), {})[parts[-2]] = tensor
    return {name: pair["lora_B"] * scale @ pair["lora_A"] for name, pair in pairs.items()}


@pytest.mark.parametrize(("ranks", "expected"), [(range(5), 8), ((0, 9, 3), 16), ((0,), 8)])
def test_padded_means_the_same_by_vllms_rules(tiny_model, tmp_path: Path, ranks, expected: int) -> None:
    shapes = linear_shapes(tiny_model)
    update = random_update(shapes, ranks=ranks)
    told = write_padded(tmp_path, update, linear=shapes, base="some/base", dtype=torch.float32)
    assert told == {"max_lora_rank": expected}
    assert expected in RANKS
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == expected
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down"))
    read = read_as_vllm(tmp_path, {name.split(".")[-1] for name in shapes} - {"lm_head"}, told["max_lora_rank"])
    assert set(read) == set(update)  # modules of rank 0 too
    for name, factors in update.items():
        assert torch.allclose(read[name], factors.B.T @ factors.A, atol=1e-7), name


def test_some_layers_only_are_named_in_full(tiny_model, tmp_path: Path) -> None:
    shapes = linear_shapes(tiny_model)
    update = {name: factors for name, factors in random_update(shapes).items() if ".1." in name}
    write_padded(tmp_path, update, linear=shapes, base=None, dtype=torch.float32)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == list(update)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"alpha_pattern": {"v_proj": 10, r"layers\.0\..*": 2}},
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {r"layers\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"up_proj": 7}, "use_rslora": True},
    ],
)
def test_pefts_own_adapters_are_read_as_peft_reads_them(tiny_model, tmp_path: Path, changes: dict) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], **changes}
    wrapped = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path)
    # Loaded again: peft sorts the patterns when it writes them, which may change which one a module meets first.
    loaded = PeftModel.from_pretrained(wrapped.unload(), tmp_path)
    theirs = logits(loaded.eval())
    bare = loaded.unload()
    update, _ = read_lora(tmp_path)
    assert len(update) == 6
    before = logits(bare)
    adapter = attach_update(bare, update)
    assert (theirs - before).abs().max() > 0.1
    assert torch.allclose(logits(bare), theirs, atol=1e-5)
    detach(adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "is DoRA; expected a plain LoRA"),
        ({"peft_type": "ADALORA"}, "is a PEFT adapter of type ADALORA; expected LORA"),
        ({"bias": "all"}, r"trains biases \(bias: all\)"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"init_lora_weights": "pissa_niter_4"}, "started from pissa_niter_4, which changes the base"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path, changes: dict, words: str) -> None:
    config = {**lora_config({"a": 1}, None), **changes}
    write_lora(tmp_path, {"a": Factors.zero((4, 4), rank=1)}, config)
    with pytest.raises(QaromaError, match=words):
        read_lora(tmp_path)


def test_damaged_adapters_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(QaromaError, match=r"holds no PEFT adapter; expected a folder with adapter_config\.json"):
        read_lora(tmp_path)
    write_lora(tmp_path, {"a": Factors.zero((4, 4), rank=1)}, lora_config({"a": 1}, None))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(1, 4)}, weights)
    with pytest.raises(QaromaError, match="is damaged: a has no A and B that fit"):
        read_lora(tmp_path)
    save_file({"base_model.model.lm_head.weight": torch.zeros(1, 4)}, weights)
    with pytest.raises(QaromaError, match=r"holds the tensor base_model\.model\.lm_head\.weight"):
        read_lora(tmp_path)
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(QaromaError, match="cannot be read"):
        read_lora(tmp_path)
    weights.unlink()
    with pytest.raises(QaromaError, match="save the adapter with safetensors"):
        read_lora(tmp_path)
