"""The shipped configurations of the paper's commonsense runs hold its published settings, and run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qaroma.cli import main
from qaroma.config.decisions import DataFacts
from qaroma.config.load import read_settings
from qaroma.config.presets import resolve

# inner rank, alpha, T_in, and of the reference's script: eps_out, steps between checks, T
PUBLISHED = {
    "paper/llama3-8b-commonsense-r1": (1, 2.0, 1000, 1e-3, 10, 100_000),
    "paper/llama3-8b-commonsense-r8": (8, 16.0, 2000, 1e-3, 200, 100_000),
}
# Where the script has another value than the paper's table, which is the preset's.
TABLE = {1: {}, 8: {"eps_out": 1e-2, "check_every": 10}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_settings_are_the_published_ones(name: str) -> None:
    given = read_settings(name, {}, [])
    facts = DataFacts(rows=170_420, lengths=[200] * 100, model_max_length=8192)
    config, _ = resolve(given, facts)
    growth, training = config.growth, config.training
    loops = (growth.t_in, growth.eps_out, growth.check_every)
    found = (growth.inner_rank, growth.alpha, *loops, training.max_steps)
    assert found == PUBLISHED[name]
    assert (training.learning_rate, training.micro_batch * training.grad_accum, config.data.max_length) == (
        1e-4,
        32,
        256,
    )
    assert (growth.inner_criterion, growth.eps_in, growth.dropout) == ("fixed", 0.1, 0.1)
    assert (growth.warmup, growth.restart_warmup, growth.min_lr_ratio) == (100, 50, 0.1)
    assert growth.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 1.0)
    # The numbers are written out, not left to a preset that may change; the preset gives those of the paper.
    for key in ("inner_rank", "alpha", "eps_out", "t_in", "check_every", "eps_in", "dropout", "warmup"):
        assert getattr(given.growth, key) is not None
    bare = read_settings(None, {}, ["model.name=m", "growth.preset=paper", f"growth.inner_rank={growth.inner_rank}"])
    preset, _ = resolve(bare, facts)
    table = {**TABLE[growth.inner_rank], "inner_criterion": "norm"}
    assert preset.growth == growth.model_copy(update=table)
    assert preset.training.max_steps == {1: 100_000, 8: 80_000}[growth.inner_rank]


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        ("glue-mrpc", "growth", {"eps_out": 1e-3}),
        ("glue-sst2", "growth", {"eps_out": 1e-2}),
        ("glue-cola", "training", {"weight_decay": 0.01}),
        ("glue-qnli", "growth", {"warmup": 200, "restart_warmup": 100}),
    ],
)
def test_where_the_references_scripts_differ_from_the_table_their_values_stand(
    name: str, section: str, expected: dict
) -> None:
    given = read_settings(f"paper/{name}", {}, [])
    assert {key: getattr(getattr(given, section), key) for key in expected} == expected
    assert given.growth.inner_criterion == "fixed"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_settings_run(name: str, tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    sets = [f"model.name={tiny_folder.as_posix()}", f"data.train={data_file.as_posix()}", "training.max_steps=2"]
    arguments = ["finetune", "--config", name, "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*arguments, *(part for key in sets for part in ("--set", key)), "--set", "training.grad_accum=1"]) == 0
    assert (tmp_path / "run" / "adapter" / "growth.json").is_file()
