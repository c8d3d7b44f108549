"""Runs in fp16: the loss falls as in bf16, overflows are survived, and a resumed run has the same bytes and scale."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from test_training import QUIET, make_config, records

from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.training import fit as fit_module
from qaroma.training import loss_scale, setup
from qaroma.training.finetune import finetune
from qaroma.training.loss_scale import LossScale

Configure = Callable[..., Config]
OVERFLOWS = 2.0**40  # a scale at which gradients of the tiny model do, wherever fp16 is computed


@pytest.fixture
def configure(tiny_folder: Path, data_file: Path) -> Configure:
    return partial(
        make_config, tiny_folder, data_file, training__max_steps=8, training__grad_accum=1, growth__eps_out=1e-9
    )


def adapter_bytes(run: Path) -> str:
    return hashlib.sha256((run / "adapter_last" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["aroma", pytest.param("peft-lora", marks=pytest.mark.slow)])
def test_the_loss_falls_as_in_bf16(configure: Configure, tmp_path: Path, method: str) -> None:
    losses = {}
    for dtype in ("bf16", "fp16"):
        run = tmp_path / dtype
        finetune(configure(run, model__compute_dtype=dtype, method=method), console=QUIET)
        losses[dtype] = [record["loss"] for record in records(run)]
    assert losses["fp16"][-1] < losses["fp16"][0] - 0.05
    assert losses["fp16"] == pytest.approx(losses["bf16"], rel=0.01)


def test_a_scale_that_overflows_is_halved_until_it_does_not(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is left out and no row: the losses are those of a run whose scale never overflowed."""
    losses = []
    for start in (1024.0, OVERFLOWS):
        monkeypatch.setattr(setup, "LossScale", partial(LossScale, start))
        run = tmp_path / f"{start:g}"
        finetune(configure(run, model__compute_dtype="fp16"), console=QUIET)
        losses.append([record["loss"] for record in records(run)])
    last = records(run)[-1]
    assert last["overflows"] >= 10
    assert last["loss_scale"] == OVERFLOWS / 2 ** last["overflows"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_gradient_that_no_scale_mends_stops_the_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = fit_module.accumulate, []

    def poisoned(session, batches, *_):
        calls.append(session.loss_scale.scale)
        return original(session, batches)[0], float("inf")

    monkeypatch.setattr(fit_module, "accumulate", poisoned)
    with pytest.raises(QaromaError, match=r"gradient of step 1 is not finite .*compute_dtype=fp32"):
        finetune(configure(tmp_path / "run", model__compute_dtype="fp16"), console=QUIET)
    assert calls == [2.0**power for power in range(16, -1, -1)]


def test_a_resumed_run_has_the_same_bytes_and_the_same_scale(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale rises after every third step, into an overflow and back: all of it is in the checkpoint."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    monkeypatch.setattr(setup, "LossScale", partial(LossScale, OVERFLOWS))
    make = partial(configure, model__compute_dtype="fp16")
    finetune(make(tmp_path / "whole"), console=QUIET)
    original = fit_module._record_step

    def killed(session, state, *rest):
        if state.step == 6:
            raise KeyboardInterrupt
        original(session, state, *rest)

    monkeypatch.setattr(fit_module, "_record_step", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(make(tmp_path / "cut"), console=QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    finetune(Config.model_validate({"output": str(tmp_path / "cut")}), resume=True, console=QUIET)
    logs = [
        [(r["loss"], r["loss_scale"], r["overflows"]) for r in records(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert len({scale for _, scale, _ in logs[0]}) > 1
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "cut")
