"""The adapter folder is a PEFT LoRA as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.attach import attach
from qaroma.model.base import load_base
from qaroma.runs.adapter import load_adapter, save_adapter
from qaroma.runs.adapter_info import AdapterInfo

INPUT = torch.arange(3, 40)[None]


def grown(model, ranks: dict[str, int] | None = None) -> Adapter:
    """An adapter whose modules have ranks 0, 1, 2, ... (the last component active, where there is one)."""
    adapter = attach(model, "all-linear", inner_rank=1, alpha=2.0)
    for index, (name, layer) in enumerate(adapter.layers.items()):
        rank = index % 5 if ranks is None else ranks[name]
        for component in range(rank):
            if component == 0:
                layer.start_component(adapter.initial_A(layer))
            else:
                layer.restart_component(adapter.initial_A(layer))
            with torch.no_grad():
                layer.active_B.normal_(std=0.5)
            layer.place_active()
    return adapter


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT).logits.float()


def load(folder: Path, quantization: str, dtype: torch.dtype = torch.float32):
    return load_base(folder, quantization=quantization, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_peft_gives_our_logits(tiny_folder: Path, tmp_path: Path, quantization: str) -> None:
    from peft import PeftModel

    model = load(tiny_folder, quantization)
    bare = logits(model)
    adapter = grown(model)
    ours = logits(model)
    assert (ours - bare).abs().max() > 0.1
    save_adapter(adapter, tmp_path / "adapter", base=str(tiny_folder))
    theirs = logits(PeftModel.from_pretrained(load(tiny_folder, quantization), tmp_path / "adapter"))
    assert (theirs - ours).abs().max() < 1e-4


def test_what_the_folder_holds(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = grown(load(tiny_folder, "none"))
    save_adapter(adapter, tmp_path / "a", base="some/base", info=AdapterInfo({}, 1, 2.0, method="aroma"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = {name: rank for name, rank in adapter.ranks().items() if rank}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    assert set(config["target_modules"]) == set(ranks)
    assert config["r"] == config["lora_alpha"] == 4
    growth = json.loads((tmp_path / "a" / "growth.json").read_text())
    assert growth["method"] == "aroma"
    assert {name: sum(parts) for name, parts in growth["components"].items()} == adapter.ranks()


def test_an_adapter_of_rank_zero_everywhere_still_loads(tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(tiny_folder, "none")
    bare = logits(model)
    adapter = attach(model)
    save_adapter(adapter, tmp_path / "a", base=str(tiny_folder))
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny_folder, "none"), tmp_path / "a")), bare)
    again = load(tiny_folder, "none")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_and_loaded_is_bit_identical(tiny_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(tiny_folder, "nf4", dtype)
    adapter = grown(model)
    save_adapter(adapter, tmp_path / "a")
    again = load(tiny_folder, "nf4", dtype)
    loaded = load_adapter(again, tmp_path / "a")
    assert loaded.ranks() == adapter.ranks()
    assert loaded.trainable_parameters() == 0
    assert torch.equal(logits(again), logits(model))


def test_another_base_is_refused_in_words(tiny_folder: Path, tmp_path: Path) -> None:
    from conftest import tiny_config
    from transformers import LlamaForCausalLM

    save_adapter(grown(load(tiny_folder, "none")), tmp_path / "a")
    wider = LlamaForCausalLM(tiny_config(intermediate_size=192))
    with pytest.raises(QaromaError, match="this model's is 192 x 64; give the base"):
        load_adapter(wider, tmp_path / "a")
    shallower = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    with pytest.raises(QaromaError, match=r"adapts model\.layers\.1.*does not have"):
        load_adapter(shallower, tmp_path / "a")
    with pytest.raises(QaromaError, match=r"no growth\.json"):
        load_adapter(wider, tmp_path)
