"""What a run keeps account of: steps to its end, sums over a resume, rates of a head, the level it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from rich.console import Console
from test_training import make_config, records
from torch import nn

from qaroma.cli import main
from qaroma.config.decisions import DataFacts
from qaroma.config.presets import resolve
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.method.adapter import Adapter
from qaroma.method.aroma import GrowthController
from qaroma.method.growth import GrowthSettings
from qaroma.method.lora import PlainLora
from qaroma.method.on_adapter import HEAD
from qaroma.method.peft_lora import PeftLora, inject_lora
from qaroma.method.schedule import warm_cosine
from qaroma.model.found import find_model
from qaroma.training import fit as fit_module
from qaroma.training import memory
from qaroma.training.finetune import finetune

QUIET = Console(quiet=True)
MEASURED = {"run", "adapter", "seconds", "training_seconds", "memory_bytes"}  # of the machine, not of the run


def test_a_resumed_run_sums_up_as_an_uninterrupted_one(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules end one after the other here, so that the mean of what trains depends on every step."""
    changes = {"growth__eps_out": 0.15, "checkpoint__every": 7, "training__evaluate_every": 4}
    finetune(make_config(tiny_folder, data_file, tmp_path / "whole", **changes), console=QUIET)
    run, accumulate, calls = tmp_path / "run", fit_module.accumulate, []

    def interrupted(session: Any, batches: Any, *shown: Any) -> tuple[dict[str, float], float]:
        calls.append(session)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return accumulate(session, batches, *shown)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "accumulate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_config(tiny_folder, data_file, run, **changes), console=QUIET)
    assert records(run)[-1]["step"] == 16  # of which the last two are lost: the checkpoint is of step 14
    finetune(Config.model_validate({"output": str(run)}), resume=True, console=QUIET)
    steps = records(run)
    assert len(steps) % 4
    assert records(run, "validation")[-1]["step"] == len(steps)  # the last step is always looked at
    trainable = [step["trainable_parameters"] for step in steps]
    assert trainable[0] > trainable[12] > trainable[-1] == 0
    first, second = (json.loads((r / "summary.json").read_text(encoding="utf-8")) for r in (tmp_path / "whole", run))
    assert {k: v for k, v in second.items() if k not in MEASURED} == {
        k: v for k, v in first.items() if k not in MEASURED
    }
    assert second["trainable_parameters_mean"] == sum(trainable) / len(trainable)
    assert second["training_seconds"] == pytest.approx(sum(step["seconds"] for step in steps), rel=1e-2)


@pytest.mark.parametrize(
    ("losses", "steps", "ended", "best"),
    [
        # Two validations without gain: one is forgiven by the next best, an equal one is no gain.
        ([4.0, 5.0, 3.0, 3.0, 3.5, 2.0, 1.0], 14, 10, 6),
        # While the learning rate is high, validation rises and falls: in the first half what is clearly worse counts.
        ([4.0, 4.1, 4.15, 4.1, 4.19, 4.1, 4.1, 4.1], 20, 14, 2),
    ],
)
def test_patience_ends_a_run_at_the_step_it_says(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float],
    steps: int, ended: int, best: int,
) -> None:  # fmt: skip
    """A validation every two steps, each with a standard error of 0.1; the first is the untrained model's."""
    given = iter([1.0, *losses])
    monkeypatch.setattr(fit_module, "validation_metrics", lambda *_: {"loss": next(given), "loss_error": 0.1})
    config = make_config(
        tiny_folder, data_file, tmp_path / "run", method="lora", checkpoint__every=50,
        training__patience=2, training__evaluate_every=2, training__max_steps=steps,
    )  # fmt: skip
    figures = finetune(config, console=QUIET)
    assert (figures["ended"], figures["steps"], figures["best_step"]) == ("patience", ended, best)
    checkpoints = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert checkpoints == {"step-00000000", f"step-{ended:08d}"}


TOTAL, WARMUP, PEAK = 12, 3, 5e-3
SHAPE = {"total": TOTAL, "warmup": WARMUP, "min_ratio": 0.2}


@pytest.mark.parametrize("method", ["aroma", "lora", "peft-lora"])
@pytest.mark.parametrize("peak", [PEAK, None])
def test_a_heads_learning_rate_is_scheduled_and_climbs_once(method: str, peak: float | None) -> None:
    """An adapter's rate falls to zero with every new component; the head's follows one cosine from its own peak."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    head = list(model[1].parameters())
    common: dict[str, Any] = {"learning_rate": 1e-2, "total_steps": TOTAL, "head_learning_rate": peak}
    trainer: Any
    if method == "peft-lora":
        trainer = PeftLora(
            inject_lora(model, ["0"], rank=2, alpha=4.0), head=head, warmup=WARMUP, min_lr_ratio=0.2, **common
        )
    elif method == "lora":
        trainer = PlainLora(Adapter(model, ["0"]), head=head, warmup=WARMUP, min_lr_ratio=0.2, **common)
    else:
        settings = GrowthSettings(
            t_in=4, check_every=1, warmup=WARMUP, restart_warmup=2, min_lr_ratio=0.2, eps_in=-1e9, eps_out=0.0
        )
        trainer = GrowthController(Adapter(model, ["0"]), settings, head=head, **common)
    seen, grown = [], 0
    if method != "peft-lora":
        step = trainer.trainer.optimiser.step
        trainer.trainer.optimiser.step = lambda rates: (seen.append(rates[HEAD][0]), step(rates))
    for _ in range(TOTAL):
        grown += len(trainer.step())
        if method == "peft-lora":
            seen.append(trainer.optimiser.param_groups[1]["lr"])
    assert grown == (2 if method == "aroma" else 0)
    assert seen == pytest.approx([(peak or 1e-2) * warm_cosine(t, **SHAPE) for t in range(TOTAL)])
    assert seen[0] < seen[WARMUP - 1] > seen[-1]


def test_auto_counts_the_examples_of_a_micro_batch(
    tiny_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one example leaves free, thirty-two of them take; what is planned is the step that is run."""
    asked = []

    class Planner:
        def __init__(self, model_config: Any) -> None: ...

        def fastest_level(self, settings: Any, free: int, host: int | None) -> int:
            asked.append((settings.micro_batch, settings.seq_len, settings.inner_rank, settings.quantized))
            return 2

    monkeypatch.setattr(memory, "Planner", Planner)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * memory.generous_bound(tiny_config(), 2 * 512))
    for micro_batch, level in ((1, 0), (32, 2)):
        given = make_config(tiny_folder, data_file, None, training__micro_batch=micro_batch, data__max_length=512)
        config, _ = resolve(given, DataFacts(8, [512], None))
        assert memory.choose_level(config, find_model(tiny_folder), torch.device("cpu")) == level
    assert asked == [(32, 512, 1, True)]


def test_the_revision_reaches_everything_that_is_loaded(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base: its configuration, tokenizer and weights, in training and whenever the run is opened again."""
    import transformers

    loaded: list[tuple[str, Any]] = []

    def spied(name: str) -> None:
        real = getattr(transformers, name).from_pretrained

        def from_pretrained(*args: Any, **options: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("qaroma."):
                loaded.append((name, options.get("revision")))
            return real(*args, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)

    kinds = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
    for kind in kinds:
        spied(kind)
    run = tmp_path / "run"
    config = make_config(tiny_folder, data_file, run, training__max_steps=1, training__memory="auto")
    config.model.revision = "v1.1"
    export = ["export", str(run), "--merge-into", "original", "--no-self-test", "--output", str(tmp_path / "out")]
    for command, expected in (
        (lambda: finetune(config, console=QUIET), kinds),
        (lambda: main(["generate", str(run), "count 7", "--max-new-tokens", "1", "--device", "cpu"]), kinds),
        (lambda: main([*export, "--format", "merged"]), kinds[:2]),
    ):
        loaded.clear()
        command()
        assert {name for name, _ in loaded} >= set(expected)
        assert {revision for _, revision in loaded} == {"v1.1"}, loaded


def test_a_family_with_an_unknown_head_is_refused_before_anything_is_written(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits / 8
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(QaromaError, match="family llama, which does something to its logits"):
        finetune(make_config(tiny_folder, data_file, tmp_path / "run"), console=QUIET)
    assert not (tmp_path / "run").exists()
