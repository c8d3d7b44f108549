"""What decisions know of a base before it is loaded."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qaroma.errors import QaromaError
from qaroma.model.builtin import ResolvedModel
from qaroma.model.facts import facts_of_base, facts_of_module
from qaroma.model.found import find_model
from qaroma.tasks.evaluation import standard_error


def test_facts_of_a_folder(tiny_folder: Path) -> None:
    facts = facts_of_base(find_model(tiny_folder), "all-linear", task="causal-lm")
    # hidden 64, key and value 32 wide, intermediate 128, two layers
    assert facts.component_parameters == 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert facts.width == 64
    assert facts.weight_std == pytest.approx(0.02, rel=0.05)
    narrow = facts_of_base(find_model(tiny_folder), ["down_proj"], task="classification")
    assert (narrow.component_parameters, narrow.width) == (2 * 192, 128)
    with pytest.raises(QaromaError, match="nope"):
        facts_of_base(find_model(tiny_folder), ["nope"], task="causal-lm")


def test_a_checkpoint_that_cannot_be_read_leaves_the_initial_size(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"not one")
    facts = facts_of_base(find_model(folder), "all-linear", task="causal-lm")
    assert (facts.width, facts.weight_std) == (64, 0.02)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_of_the_hub_is_looked_at_by_its_index(
    shards: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # not what initializer_range says
    model.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in model.parameters()) // shards + 100_000)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    fetched = []

    def hub(_: str, name: str, *, local_files_only: bool, **__: object) -> str | None:
        assert not local_files_only
        fetched.append(name)
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr("transformers.utils.cached_file", hub)
    base = replace(find_model(tiny_folder), place=ResolvedModel("somebody/something"))
    assert facts_of_base(base, "all-linear", task="causal-lm").weight_std == pytest.approx(0.06, rel=0.05)
    assert len(fetched) == 2  # the index, and one file


def test_facts_of_a_model_in_memory() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5), nn.Linear(5, 5))
    facts = facts_of_module(model, ["0", "1"])
    assert (facts.component_parameters, facts.width) == (30 + 25, 15)
    stds = sorted(model[i].weight.std().item() for i in (0, 1))
    assert stds[0] <= facts.weight_std <= stds[1]


def test_the_standard_error_of_a_loss_is_that_of_its_batches() -> None:
    torch.manual_seed(0)
    counts = torch.randint(5, 40, (64,)).double()
    sums = counts * 2.0 + counts.sqrt() * torch.randn(64).double()
    drawn = torch.randint(64, (4000, 64))
    bootstrap = (sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)).std().item()
    assert standard_error(sums, counts) == pytest.approx(bootstrap, rel=0.1)
    # Batches of one size: the textbook's standard error of a mean.
    even = torch.full((64,), 10.0).double()
    textbook = (sums / 10).std().item() / math.sqrt(64)
    assert standard_error(sums, even) == pytest.approx(textbook)
    assert standard_error(sums[:1], counts[:1]) == 0.0
