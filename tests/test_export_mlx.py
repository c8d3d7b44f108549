"""The MLX adapter by mlx-lm's rules, and in mlx-lm itself on MLX's CPU backend; a merged checkpoint in it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_adapters import random_update
from families import FAMILIES as CONFIGS
from families import write_base
from test_export_gguf import tiny
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

from qaroma.errors import QaromaError
from qaroma.export.merged import write_merged
from qaroma.export.mlx_adapter import FAMILIES, check_family, read_mlx_adapter, write_mlx_adapter
from qaroma.export.weights import dequantised_tensors
from qaroma.method.attach import attach_update, linear_shapes

IDS = [[5, 9, 200, 31, 77, 12, 8]]


def in_mlx_lm(base: Path, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    """Logits of a checkpoint, with an adapter or not, by mlx-lm's own loaders."""
    utils = pytest.importorskip("mlx_lm.utils")
    import mlx.core as mx

    model, _ = utils.load_model(base, False)
    if adapter is not None:
        model = utils.load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def test_an_adapter_comes_back_by_mlx_lms_rules(tiny_model, tmp_path: Path) -> None:
    update = random_update(linear_shapes(tiny_model))
    write_mlx_adapter(tmp_path, update, tiny_model.config, base="org/base", dtype=torch.float32)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["fine_tune_type"], settings["num_layers"], settings["model"]) == ("lora", 2, "org/base")
    parameters = settings["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (4, 1.0)
    grown = {name.split(".", 3)[3] for name, factors in update.items() if factors.rank}
    assert parameters["keys"] == sorted(grown)
    read = read_mlx_adapter(tmp_path, update)
    assert set(read) == {name for name, factors in update.items() if factors.rank}
    for name, factors in read.items():
        assert factors.rank == 4  # one for all
        assert torch.allclose(factors.B.T @ factors.A, update[name].B.T @ update[name].A, atol=1e-7), name


def test_families_that_are_named_otherwise_are_refused() -> None:
    with pytest.raises(QaromaError, match=r"the architecture 'gpt_neox', which MLX exports do not cover.*merged"):
        check_family(GPTNeoXConfig())


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
def test_mlx_lm_gives_transformers_logits(family: str, tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    write_base(family, tmp_path / "saved", tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    base, update = tmp_path / "base", random_update(linear_shapes(model), size=1.0)
    base.mkdir()
    write_merged(base, dequantised_tensors(model), {}, model.config, dtype=torch.float32)
    write_mlx_adapter(tmp_path, update, model.config, base="org/base", dtype=torch.float32)
    with torch.no_grad():
        bare = model(torch.tensor(IDS)).logits.numpy()
        attach_update(model, update)
        tuned = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(tuned - bare).max() > 1
    found = in_mlx_lm(base, tmp_path)
    print(f"\n{family}: largest difference {np.abs(found - tuned).max():.2g}")
    assert np.abs(found - tuned).max() < 2e-3  # mlx-lm's GELU is 1e-3 away in gemma and starcoder2


def test_a_merge_says_its_angles_to_old_readers_too(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    kinds = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}
    gemma = AutoConfig.for_model("gemma3_text", **CONFIGS["gemma3_text"], rope_parameters=kinds)
    (tmp_path / "gemma").mkdir()
    write_merged(tmp_path / "gemma", [], {}, gemma, dtype=torch.float32)
    settings = json.loads((tmp_path / "gemma" / "config.json").read_text())
    assert (settings["rope_theta"], settings["rope_local_base_freq"]) == (2e6, 3e4)
    assert settings["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert AutoConfig.from_pretrained(tmp_path / "gemma").rope_parameters == gemma.rope_parameters
    model = tiny("llama3")
    write_merged(tmp_path, dequantised_tensors(model), {}, model.config, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["rope_type"] == "llama3"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        wanted = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(in_mlx_lm(tmp_path) - wanted).max() < 1e-4
