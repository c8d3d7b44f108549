"""PEFT's LoRA and AdaLoRA through our loop, and ReLoRA: the methods that AROMA is compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_labelled import make_config as labelled_config
from test_training import make_config, records

from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.inference.open import evaluate_run
from qaroma.method.adapter import Adapter
from qaroma.method.peft_lora import ADAPTER, AdaLora, PeftLora, inject_adalora, inject_lora
from qaroma.runs.adapter import load_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.directory import RunDirectory
from qaroma.training import fit as fit_module
from qaroma.training.finetune import finetune
from qaroma.training.prepare import prepare_data
from qaroma.training.setup import build_session

QUIET = Console(quiet=True)
TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def session_of(config: Config, tmp_path: Path) -> Any:
    return build_session(prepare_data(config), RunDirectory(tmp_path / "unused"))


def gradients_of(session: Any, step: int) -> float:
    batches = [session.task.collate([session.train[i] for i in indices]) for indices in session.plan.step(step)]
    return fit_module.accumulate(session, batches)[0]["loss"]


def random_steps(method: Any, count: int) -> None:
    for _ in range(count):
        for parameter in method._parameters.values():
            parameter.grad.normal_()
        method.step()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_pefts_lora_and_ours_take_the_same_steps(
    tiny_folder: Path, data_file: Path, tmp_path: Path, quantization: str
) -> None:
    sessions = [
        session_of(
            make_config(tiny_folder, data_file, None, method=method, rank=4, model__quantization=quantization), tmp_path
        )
        for method in ("lora", "peft-lora")
    ]
    ours, theirs = (session.method for session in sessions)
    assert theirs.trainable_parameters() == ours.trainable_parameters() > 0
    assert theirs.ranks() == ours.ranks()
    assert theirs.components() == ours.components()
    for step in range(4):
        losses = [gradients_of(session, step) for session in sessions]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        for name, layer in ours.adapter.layers.items():
            peft = theirs.layers[name]
            torch.testing.assert_close(peft.lora_A[ADAPTER].weight.grad, layer.active_A.grad, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(peft.lora_B[ADAPTER].weight.grad.T, layer.active_B.grad, rtol=1e-3, atol=1e-6)
        for method in (ours, theirs):
            method.step()
        assert theirs.learning_rate == ours.learning_rate
        for name, (A, B) in ours.factors().items():
            torch.testing.assert_close(theirs.factors()[name], (A, B), rtol=1e-3, atol=2e-5)
    assert B.abs().max() > 0


def test_dropout_of_the_base_is_drawn_alike_under_every_method(
    encoder_folder: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    losses = []
    for method in ("lora", "peft-lora", "adalora"):
        config = labelled_config(encoder_folder, pairs, None, method=method, rank=4, model__quantization="none")
        session = session_of(config, tmp_path)
        session.model.train()
        losses.append(gradients_of(session, 0))  # B or E is zero: the base's own loss
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)


@pytest.mark.parametrize("method", ["peft-lora", "adalora"])
def test_saving_memory_changes_no_gradient(tiny_folder: Path, data_file: Path, tmp_path: Path, method: str) -> None:
    """In bf16 on a 4-bit base, where the adapter stays in fp32."""
    gradients = []
    for level in (0, 2):
        config = make_config(
            tiny_folder, data_file, None, method=method, rank=4, model__compute_dtype="bf16", training__memory=level
        )
        session = session_of(config, tmp_path)
        session.model.train()
        for step in range(2):
            gradients_of(session, step)
            session.method.step()
        gradients_of(session, 2)
        gradients.append([p.grad.clone() for p in session.method._adapter.values()])
    assert all(g.dtype == torch.float32 and g.norm() > 0 for g in gradients[0])
    for other, first in zip(gradients[1], gradients[0], strict=True):
        assert torch.equal(other, first)


def test_the_penalty_is_what_peft_adds_to_a_loss(tiny_model: Any) -> None:
    tuner = inject_adalora(tiny_model, TARGETS, rank=4, alpha=8, total_steps=20)
    method = AdaLora(tuner, learning_rate=1e-2, total_steps=20)
    random_steps(method, 3)
    ids = torch.randint(0, 512, (2, 9))
    plain = tiny_model(input_ids=ids, labels=ids).loss
    with_penalty = tuner(input_ids=ids, labels=ids).loss
    assert method.penalty().item() == pytest.approx((with_penalty - plain).item(), rel=1e-4)
    method.penalty().backward()
    ours = [p.grad.clone() for p in method._adapter.values()]
    method.zero_grad()
    (tuner(input_ids=ids, labels=ids).loss - tiny_model(input_ids=ids, labels=ids).loss).backward()
    torch.testing.assert_close([p.grad for p in method._adapter.values()], ours, rtol=1e-4, atol=1e-5)


def test_the_penalty_reaches_every_step(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The gradients that the loop accumulates are those of loss plus penalty, however many micro-batches."""
    session = session_of(make_config(tiny_folder, data_file, None, method="adalora", rank=4), tmp_path)
    gradients_of(session, 0)
    layer = next(iter(session.method.layers.values()))
    with_penalty = layer.lora_A[ADAPTER].grad.clone()  # E is zero: the loss itself gives A no gradient
    session.method.zero_grad()
    session.method.penalty().backward()
    assert with_penalty.norm() > 0
    torch.testing.assert_close(with_penalty, layer.lora_A[ADAPTER].grad)


def test_adalora_equals_pefts_own_loop(tiny_model: Any) -> None:
    twin = copy.deepcopy(tiny_model)
    options = {"rank": 4, "alpha": 8, "total_steps": 16}
    theirs = inject_adalora(twin, TARGETS, **options)
    method = AdaLora(
        inject_adalora(tiny_model, TARGETS, **options), learning_rate=2e-2, total_steps=16, min_lr_ratio=1.0
    )
    parameters = [p for p in theirs.parameters() if p.requires_grad and p.numel() > 1]
    optimiser = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    for step in range(1, 17):
        ids = torch.randint(0, 512, (2, 9))
        theirs(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        theirs.update_and_allocate(step)
        optimiser.zero_grad()
        (tiny_model(input_ids=ids, labels=ids).loss + method.penalty()).backward()
        method.step()
        assert theirs.peft_config[ADAPTER].rank_pattern == method.tuner.peft_config[ADAPTER].rank_pattern
    for name, layer in method.layers.items():
        other = twin.get_submodule(name)
        for factor in ("lora_A", "lora_B", "lora_E"):
            ours, expected = getattr(layer, factor)[ADAPTER], getattr(other, factor)[ADAPTER]
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_the_budget_is_allocated_between_update_and_zeroing(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = inject_adalora(tiny_model, TARGETS, rank=4, alpha=8, total_steps=20)
    method = AdaLora(tuner, learning_rate=1e-2, total_steps=20)
    seen = []
    updates = []
    original = method.optimiser.step
    monkeypatch.setattr(method.optimiser, "step", lambda: (updates.append(1), original()))
    monkeypatch.setattr(
        tuner, "update_and_allocate",
        lambda step: seen.append((step, len(updates), all(p.grad.norm() > 0 for p in method._adapter.values()))),
    )  # fmt: skip
    random_steps(method, 3)
    assert seen == [(1, 1, True), (2, 2, True), (3, 3, True)]
    assert all(p.grad.norm() == 0 for p in method._adapter.values())


@pytest.mark.parametrize("total", [2, 3, 7, 40, 2500])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_schedule_ends_at_the_target_whatever_the_length(tiny_model: Any, total: int, rank: int) -> None:
    tuner = inject_adalora(tiny_model, TARGETS, rank=rank, alpha=8, total_steps=total)
    config = tuner.peft_config[ADAPTER]
    assert config.init_r == {1: 2, 2: 3, 8: 12}[rank]
    method = AdaLora(tuner, learning_rate=1e-2, total_steps=total)
    assert set(method.ranks().values()) == {config.init_r}
    if total == 2500:
        assert (config.tinit, config.tfinal, config.deltaT) == (375, 1249, 2)
        return
    random_steps(method, total)
    assert sum(method.ranks().values()) == rank * len(TARGETS)
    nonzero = {name: int((layer.lora_E[ADAPTER] != 0).sum()) for name, layer in method.layers.items()}
    assert method.ranks() == nonzero


@pytest.mark.parametrize(("first", "second"), [(1, 1), (10, 20), (10, 7), (4, 2)])
def test_another_budget_on_the_way_does_not_break_the_allocation(tiny_model: Any, first: int, second: int) -> None:
    """As `finetune --resume --max-steps` does it; (10, 20) meets the new last allocation unmeasured."""
    twin = copy.deepcopy(tiny_model)
    method = AdaLora(inject_adalora(tiny_model, TARGETS, rank=2, alpha=4, total_steps=first),
                     learning_rate=1e-2, total_steps=first)  # fmt: skip
    random_steps(method, min(first, second) if first > second else first)
    again = AdaLora(inject_adalora(twin, TARGETS, rank=2, alpha=4, total_steps=second),
                    learning_rate=1e-2, total_steps=second)  # fmt: skip
    again.load_state(method.state())
    random_steps(again, max(1, second - first))
    assert sum(again.ranks().values()) == (2 if first > 1 else 3) * len(TARGETS)


@pytest.mark.parametrize("method", ["peft-lora", "adalora"])
def test_factors_give_the_same_output_in_our_layers(tiny_model: Any, method: str) -> None:
    twin = copy.deepcopy(tiny_model)
    trained: Any
    if method == "adalora":
        tuner = inject_adalora(tiny_model, TARGETS, rank=4, alpha=8, total_steps=30)
        trained = AdaLora(tuner, learning_rate=5e-2, total_steps=30)
    else:
        trained = PeftLora(inject_lora(tiny_model, TARGETS, rank=4, alpha=6), learning_rate=5e-2, total_steps=30)
    ids = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        before = tiny_model(ids).logits
    for count in (7, 20):  # while the budget falls, and after it
        random_steps(trained, count)
        adapter = Adapter(copy.deepcopy(twin), TARGETS)
        for name, layer in adapter.layers.items():
            layer.load_factors(*trained.factors()[name], trained.components()[name])
        with torch.no_grad():
            expected = tiny_model(ids).logits
            torch.testing.assert_close(adapter.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - before).abs().max() > 1e-3
    trained.finish()
    saved, components = trained.factors(), trained.components()
    for layer in trained.layers.values():
        layer.lora_A[ADAPTER].requires_grad_(False)
    again = {name: (A.clone(), B.clone()) for name, (A, B) in saved.items()}
    again[TARGETS[0]] = again[TARGETS[0]][0][:0], again[TARGETS[0]][1][:0]
    if method == "adalora":
        trained.load_factors(again, {**components, TARGETS[0]: []})
        assert trained.ranks()[TARGETS[0]] == 0
    trained.load_factors(saved, components)
    torch.testing.assert_close(trained.factors(), saved)
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert trained.active_modules() == trained.trainable_parameters() == 0


@pytest.mark.parametrize("method", ["peft-lora", "adalora", "relora"])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_folder: Path, data_file: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_for(name: str) -> Config:
        return make_config(
            tiny_folder, data_file, tmp_path / name, method=method, rank=4, growth__dropout=0.1,
            training__max_steps=16, training__evaluate_every=4,
        )  # fmt: skip

    finetune(config_for("whole"), console=QUIET)
    original, calls = fit_module.accumulate, []

    def dies(session: Any, batches: Any, *others: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(session, batches, *others)

    monkeypatch.setattr(fit_module, "accumulate", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(config_for("cut"), console=QUIET)
    monkeypatch.undo()
    figures = finetune(Config.model_validate({"output": str(tmp_path / "cut")}), resume=True, console=QUIET)
    assert figures["method"] == method
    for name in ("adapter", "adapter_last"):
        for file in ("adapter_model.safetensors", "growth.json"):
            assert (tmp_path / "cut" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    shown = [[r["ranks"] for r in records(tmp_path / run, "ranks")] for run in ("cut", "whole")]
    assert shown[0] == shown[1]


def test_adaloras_ranks_change_and_its_adapter_opens_elsewhere(
    tiny_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = make_config(
        tiny_folder, data_file, run, method="adalora", rank=4, training__max_steps=24, data__validation=str(data_file)
    )
    figures = finetune(config, console=QUIET)
    ranks = [r["ranks"] for r in records(run, "ranks")]
    assert set(ranks[0].values()) == {6}
    assert sum(ranks[-1].values()) == 4 * len(ranks[-1])
    assert len(set(ranks[-1].values())) > 1, "every module was given the same rank"
    totals = [sum(r.values()) for r in ranks]
    assert totals == sorted(totals, reverse=True)
    info = AdapterInfo.read(run / "adapter_last")
    assert (info.method, info.inner_rank) == ("adalora", 4)
    assert info.ranks() == ranks[-1]
    assert figures["validation_loss"] < figures["validation_loss_before"]
    again = evaluate_run(str(run), [(str(data_file), 1.0)], device="cpu")
    assert again["loss"] == pytest.approx(figures["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", ["peft-lora", "adalora"])
def test_a_classifier_scores_the_same_when_loaded_again(
    encoder_folder: Path,
    pairs: Path,
    tmp_path: Path,
    method: str,
    quantization: str,
) -> None:
    run = tmp_path / "run"
    config = labelled_config(encoder_folder, pairs, run, method=method, rank=4, model__quantization=quantization)
    figures = finetune(config, console=QUIET)
    assert (figures["method"], figures["ended"]) == (method, "budget")
    best = next(v for v in records(run, "validation") if v["step"] == figures["best_step"])
    again = evaluate_run(str(run), [(str(pairs / "dev.jsonl"), 1.0)], device="cpu")
    assert again["accuracy"] == pytest.approx(best["accuracy"])
    assert again["loss"] == pytest.approx(best["loss"], abs=1e-4)


def test_merging_in_our_export_equals_pefts_own_forward(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(tiny_folder, data_file, tmp_path / "run", method="adalora", rank=2, model__quantization="none")
    session = session_of(config, tmp_path)
    for step in range(12):
        gradients_of(session, step)
        session.method.step()
    session.save_adapter(tmp_path / "adapter", 12)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    load_adapter(base, tmp_path / "adapter")
    ids = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(ids).logits, session.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_relora_grows_on_time_alone(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    figures = finetune(make_config(tiny_folder, data_file, run, method="relora"), console=QUIET)
    assert (figures["method"], figures["ended"]) == ("relora", "budget")
    assert sorted({g["step"] for g in records(run, "growth")}) == [6, 12, 18, 20]
    assert AdapterInfo.read(run / "adapter_last").method == "relora"
    assert (figures["rank_min"], figures["rank_max"]) == (4, 4)


def test_what_is_missing_or_contradicts_is_said(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_folder, data_file, tmp_path / "run", method="adalora", model__adapter="elsewhere")
    with pytest.raises(QaromaError, match=r"model\.adapter with method adalora, which begins anew"):
        session_of(config, tmp_path)
    monkeypatch.setattr("qaroma.config.methods.find_spec", lambda name: None)
    config = make_config(tiny_folder, data_file, tmp_path / "run", method="peft-lora")
    with pytest.raises(QaromaError, match=r"method peft-lora needs peft; type: pip install 'qaroma\[bench\]'"):
        session_of(config, tmp_path)
