"""Classification and regression: from labelled rows to an adapter with its head, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA
from rich.console import Console

from qaroma.config.schema import Config
from qaroma.data.glue import dev_file, glue_task
from qaroma.data.labelled import LabelledExample, LabelledSet, encode_labelled, split_labelled
from qaroma.data.sources import read_rows
from qaroma.errors import QaromaError
from qaroma.inference.open import evaluate_run, open_run
from qaroma.runs.directory import RunDirectory
from qaroma.tasks.labelled import Classification, Regression
from qaroma.training import fit as fit_module
from qaroma.training.finetune import finetune
from qaroma.training.prepare import prepare_data
from qaroma.training.setup import build_session

QUIET = Console(quiet=True)


def make_config(model: Path, data: Path, output: Path | None, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"name": str(model), "compute_dtype": "fp32"},
        "task": "classification",
        "data": {"train": [{"path": str(data)}]},
        "growth": {"t_in": 6, "check_every": 2, "warmup": 1, "restart_warmup": 1},
        "training": {"max_steps": 12, "micro_batch": 8, "grad_accum": 1, "device": "cpu", "learning_rate": 1e-2,
                     "evaluate_every": 4},
        "checkpoint": {"every": 5},
        "evaluation": {"report": False},
        "output": str(output) if output else None,
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return Config.model_validate(values)


def session_of(config: Config, tmp_path: Path) -> Any:
    return build_session(prepare_data(config), RunDirectory(tmp_path / "unused"))


def records(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.get("event") == event]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_learns_saves_its_head_and_scores_the_same_when_loaded_again(
    encoder_folder: Path, pairs: Path, tmp_path: Path, quantization: str
) -> None:
    run = tmp_path / "run"
    config = make_config(encoder_folder, pairs, run, model__quantization=quantization)
    figures = finetune(config, console=QUIET)
    validations = records(run, "validation")
    assert {"loss", "accuracy", "f1", "matthews", "examples"} <= set(validations[0])
    assert all(v["examples"] == 23 for v in validations)  # the folder's whole dev file
    assert validations[-1]["loss"] < validations[0]["loss"]
    assert figures["metric"] == "accuracy"
    best = [v for v in validations if v["chosen"]][-1]
    again = evaluate_run(str(run), [(str(pairs / "dev.jsonl"), 1.0)])
    assert again["accuracy"] == pytest.approx(best["accuracy"])
    assert again["loss"] == pytest.approx(best["loss"], abs=1e-4)


def test_peft_loads_adapter_and_head(encoder_folder: Path, pairs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = make_config(encoder_folder, pairs, tmp_path / "run", model__quantization="none")
    session = session_of(config, tmp_path)
    for step in range(8):
        fit_module.accumulate(session, [session.task.collate([session.train[i] for i in session.plan.step(step)[0]])])
        session.method.step()
    session.save_adapter(tmp_path / "adapter", 8)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["modules_to_save"] == ["classifier"]
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=2, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batch = session.task.collate(session.validation)
    ours = session.model.eval()
    with torch.no_grad():
        expected = session.task.logits(ours, batch)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        torch.testing.assert_close(theirs(**inputs, token_type_ids=batch.token_type_ids).logits, expected)


def test_a_decoder_classifies_in_four_bits(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    figures = finetune(make_config(tiny_folder, pairs, run), console=QUIET)
    assert figures["metric_last"] is not None
    assert evaluate_run(str(run), [(str(pairs / "dev.jsonl"), 1.0)])["rows"] == 23
    with pytest.raises(QaromaError, match="was trained for classification and writes no text; score it with"):
        open_run(run)


def test_regression_finds_a_figure(encoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "self " * (1 + n % 6), "score": n % 6} for n in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    run = tmp_path / "run"
    config = make_config(
        encoder_folder, data, run, task="regression", data__validation=str(data), training__max_steps=40,
        training__evaluate_every=40,
    )  # fmt: skip
    figures = finetune(config, console=QUIET)
    assert figures["metric"] == "pearson"
    assert figures["metric_last"] > 0.5
    assert set(evaluate_run(str(run), [(str(data), 1.0)])) >= {"pearson", "spearman", "loss"}


@pytest.mark.parametrize("size", [5, 8, 23])
def test_the_last_short_batch_counts_like_any_other(
    encoder_folder: Path, pairs: Path, tmp_path: Path, size: int
) -> None:
    """The published evaluation scored only the last batch of a dev set."""
    session = session_of(make_config(encoder_folder, pairs, None), tmp_path)
    examples = session.validation
    batches = [session.task.collate(examples[i : i + size]) for i in range(0, 23, size)]
    device = torch.device("cpu")
    figures = session.task.evaluate(session.model, batches, device)
    alone = [session.task.evaluate(session.model, [session.task.collate([e])], device) for e in examples]
    assert figures["examples"] == 23
    assert figures["accuracy"] == pytest.approx(sum(f["accuracy"] for f in alone) / 23)
    assert figures["loss"] == pytest.approx(sum(f["loss"] for f in alone) / 23, rel=1e-4)


@pytest.mark.parametrize("method", ["aroma", "lora"])
def test_resumed_equals_uninterrupted_head_included(
    encoder_folder: Path, pairs: Path, tmp_path: Path, method: str
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finetune(make_config(encoder_folder, pairs, whole, method=method), console=QUIET)
    config = make_config(encoder_folder, pairs, halves, method=method)
    finetune(config, console=QUIET)
    shutil.rmtree(halves / "checkpoints" / "step-00000012")
    shutil.rmtree(halves / "adapter_last")  # it holds what the resumed run is to find again
    finetune(Config.model_validate({"output": str(halves)}), resume=True, console=QUIET)
    first, second = ((r / "adapter_last" / "adapter_model.safetensors").read_bytes() for r in (whole, halves))
    assert first == second


def test_the_head_trains_in_fp32_and_the_base_stays(encoder_folder: Path, pairs: Path, tmp_path: Path) -> None:
    config = make_config(encoder_folder, pairs, None, model__compute_dtype="bf16")
    session = session_of(config, tmp_path)
    before = {k: v.clone() for k, v in session.model.state_dict().items() if "active" not in k}
    for step in range(4):
        fit_module.accumulate(session, [session.task.collate([session.train[i] for i in session.plan.step(step)[0]])])
        session.method.step()
    changed = {k for k, v in session.model.state_dict().items() if k in before and not torch.equal(v, before[k])}
    heads = {k for k in before if k.startswith("classifier.")}
    assert heads <= changed
    assert all(k in heads or k.endswith((".A", ".B")) for k in changed)
    assert session.head.modules["classifier"].weight.dtype == torch.float32


def test_pruned_moments_of_a_new_component_leave_the_head_alone(
    encoder_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    session = session_of(make_config(encoder_folder, pairs, None, growth__eps_out=0.0), tmp_path)
    optimiser = session.method.trainer.optimiser
    for step in range(6):
        fit_module.accumulate(session, [session.task.collate([session.train[i] for i in session.plan.step(step)[0]])])
        grew = session.method.step()
    assert {event.decision for event in grew} == {"commit"}
    moments = optimiser.second_moment
    assert (moments[optimiser.slices["(head)"]] == 0).sum() == 0
    first = next(iter(optimiser.slices.values()))
    assert (moments[first] == 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([{"words": "a", "label": 1}], "classification", r"no text under a known key; got words, label; expected"),
        ([{"text": "a", "answer": 1}], "classification", r"no label under a known key"),
        ([{"text": "a", "label": 1}] * 2, "classification", r"all rows have the label 1; expected at least two"),
        ([{"text": "a", "label": "x"}], "regression", r"'x' is no number; expected one, or --task classification"),
        ([{"text": " ", "label": 1}, {"text": "b", "label": 0}], "classification", r"missing or blank"),
        ([{"text": "a", "label": -1}], "classification", r"the label is -1"),
        ([{"text": "a", "label": n / 7} for n in range(300)], "classification", r"300 different.*--task regression"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, tokenizer: Any, rows: list[dict], task: Any, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    with pytest.raises(QaromaError, match=message):
        encode_labelled(read_rows([(str(file), 1.0)]), tokenizer, task)


def test_a_dev_label_that_training_never_has_is_refused(pairs: Path, tmp_path: Path, tokenizer: Any) -> None:
    train = encode_labelled(read_rows([(str(pairs / "train.jsonl"), 1.0)]), tokenizer, "classification")
    assert train.labels == ("other", "same")
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"sentence1": "a", "sentence2": "b", "label": "third"}\n', encoding="utf-8")
    with pytest.raises(QaromaError, match="'third' is none of other, same"):
        encode_labelled(read_rows([(str(odd), 1.0)]), tokenizer, "classification", labels=train.labels)


def test_no_row_is_on_both_sides_of_the_split() -> None:
    """Rows of weight 2, from a file that is named twice."""
    examples = [LabelledExample([n], None, n % 2, f"a.jsonl:{n}", 2.0) for n in range(20)] * 2
    train, held_out = split_labelled(LabelledSet(examples, ("text",), "label"), share=0.25, at_most=99, seed=0)
    trained, kept = ([e.origin for e in part.examples] for part in (train, held_out))
    assert len(set(kept)) == len(kept) == 5
    assert set(trained) == {e.origin for e in examples} - set(kept)
    assert all(trained.count(origin) == 4 for origin in trained)


def test_whole_numbers_keep_their_order(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "label": n} for n in (10, 2, 1, 0)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    found = encode_labelled(read_rows([(str(file), 1.0)]), tokenizer, "classification")
    assert found.labels == ("0", "1", "2", "10")
    assert [e.label for e in found.examples] == [3.0, 2.0, 1.0, 0.0]


def test_glue_is_known_by_name() -> None:
    assert glue_task("glue:sst2") == glue_task("somewhere/glue/SST-2") == glue_task("glue/SST-2/train_5k.jsonl")
    assert glue_task("glue:stsb").kind == "regression"
    assert glue_task("glue:cola").metric == "matthews"
    assert glue_task("data/mine.jsonl") is None
    with pytest.raises(QaromaError, match="expected glue: and one of cola"):
        glue_task("glue:mprc")


def test_a_task_of_the_wrong_kind_says_what_to_type(encoder_folder: Path, pairs: Path, tmp_path: Path) -> None:
    stsb = tmp_path / "STS-B"
    stsb.mkdir()
    (stsb / "train.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 1.5}\n', encoding="utf-8")
    with pytest.raises(QaromaError, match="is a regression task; type --task regression"):
        prepare_data(make_config(encoder_folder, stsb, None))
    with pytest.raises(QaromaError, match="expected one of accuracy, f1, matthews for --task classification"):
        prepare_data(make_config(encoder_folder, pairs, None, evaluation__metric="pearson"))
    with pytest.raises(QaromaError, match=r"glue:mrpc has labels, not answers; type --task classification"):
        prepare_data(make_config(encoder_folder, Path("glue:mrpc"), None, task="causal-lm"))
    with pytest.raises(QaromaError, match=r"evaluation\.prompts is for --task causal-lm.*leave it out"):
        prepare_data(make_config(encoder_folder, pairs, None, evaluation__prompts=["hello"]))


@pytest.mark.parametrize(("name", "train", "dev"), [("MRPC", 3668, 408), ("RTE", 2490, 277), ("STS-B", 5749, 1500)])
def test_real_glue_is_read_whole(tokenizer: Any, name: str, train: int, dev: int) -> None:
    folder = SHARED_DATA / "glue" / name
    if not folder.is_dir():
        pytest.skip(f"{folder.name} of GLUE is not here")
    kind = glue_task(str(folder)).kind
    found = dev_file(str(folder))
    assert found is not None
    rows = [read_rows([(str(path), 1.0)]) for path in (folder / "train.jsonl", found)]
    assert [len(r.rows) for r in rows] == [train, dev]
    data = encode_labelled(rows[1].head(50), tokenizer, kind)
    assert len(data.examples) == 50
    task = Regression() if kind == "regression" else Classification(2)
    assert task.collate(data.examples[:4]).labels.shape == (4,)
