"""Task preference: its loss, the reference beside the run, what a run does, and what other commands make of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_training import make_config, records

from qaroma.cli import main
from qaroma.config.decisions import DataFacts
from qaroma.config.presets import resolve
from qaroma.config.schema import Config
from qaroma.data.example import IGNORED, Example, Pair
from qaroma.errors import QaromaError
from qaroma.method.attach import attach
from qaroma.runs.directory import RunDirectory
from qaroma.tasks.preference import Preference, answer_log_probabilities
from qaroma.training import fit as fit_module
from qaroma.training import reference as reference_module
from qaroma.training.finetune import finetune
from qaroma.training.prepare import prepare_data
from qaroma.training.reference import add_reference
from qaroma.training.setup import build_session

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preference_config(model: Path, data: Path, output: Path | None, **changes: Any) -> Config:
    usual: dict[str, Any] = {
        "growth": {},
        "training": {"max_steps": 8, "micro_batch": 2, "grad_accum": 2, "device": "cpu", "evaluate_every": 4},
        "checkpoint": {"every": 4},
    }
    return make_config(model, data, output, task="preference", **usual | changes)


def session_of(config: Config, run: Path) -> Any:
    return build_session(prepare_data(config), RunDirectory(run))


def random_pair(asked: int, chosen: int, rejected: int) -> Pair:
    question = torch.randint(3, 500, (asked,)).tolist()

    def answered(length: int) -> Example:
        answer = torch.randint(3, 500, (length,)).tolist()
        return Example(question + answer, [IGNORED] * asked + answer)

    return Pair(answered(chosen), answered(rejected))


def naive_log_probability(model: Any, example: Example) -> torch.Tensor:
    """From the logits of all tokens and the whole vocabulary."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].float().log_softmax(-1)
    return sum(
        (logits[at - 1, label] for at, label in enumerate(example.labels) if label != IGNORED), torch.tensor(0.0)
    )


def test_loss_figures_and_gradient_are_those_of_the_formula(tiny_model) -> None:
    """-log sigmoid(beta (log pi(w) / ref(w) - log pi(l) / ref(l))), the sums over each answer's tokens (DPO, eq. 7)."""
    adapter = attach(tiny_model, inner_rank=2)
    for layer in adapter.layers.values():
        layer.start_component(adapter.initial_A(layer))
        torch.nn.init.normal_(layer.active_B, std=0.3)
    pairs = [
        replace(random_pair(*sizes), reference=reference)
        for sizes, reference in (((5, 9, 3), (-41.0, -22.5)), ((12, 2, 17), (-9.0, -95.0)), ((3, 6, 6), (-30.0, -29.0)))
    ]
    task = Preference(beta=0.3)
    loss, sums = task.step(tiny_model, task.collate(pairs))
    loss.backward()
    gradients = [p.grad.clone() for p in tiny_model.parameters() if p.grad is not None]
    tiny_model.zero_grad()
    margins = torch.stack([
        0.3 * ((naive_log_probability(tiny_model, pair.chosen) - pair.reference[0])
               - (naive_log_probability(tiny_model, pair.rejected) - pair.reference[1]))
        for pair in pairs
    ])  # fmt: skip
    truth = -(1 / (1 + (-margins.double()).exp())).log().sum()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert sums["margin"].item() == pytest.approx(margins.sum().item(), rel=1e-5)
    assert sums["accuracy"].item() == (margins > 0).sum().item()
    assert len(gradients) == 28
    for ours, p in zip(gradients, (p for p in tiny_model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_a_run_prefers_the_chosen_answers_and_says_so(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    finetune(preference_config(tiny_folder, pairs_file, run, evaluation={"report": True}), console=Console())
    said = capsys.readouterr().out
    assert "step 0: validation loss 0.6931, accuracy 0.5000, margin 0.0000" in said
    assert "step 8/8  loss 0.6" in said
    assert "  accuracy 1.000  margin 0.0" in said
    steps, validations = records(run), records(run, "validation")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the model is its own reference
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["margin"] > 0
    assert validations[-1]["loss"] < validations[0]["loss"]
    assert (validations[-1]["accuracy"], validations[-1]["examples"]) == (1.0, 2)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Validation accuracy" in page
    assert "Margin of the chosen answer (running mean)" in page


def test_growth_ends_by_itself_when_the_pairs_are_told_apart(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    training = {"max_steps": 60, "micro_batch": 4, "grad_accum": 1, "device": "cpu", "learning_rate": 1e-2, "beta": 1.0}
    figures = finetune(preference_config(tiny_folder, pairs_file, run, training=training), console=QUIET)
    assert figures["ended"] == "learnt"
    losses = [step["loss"] for step in records(run)]
    assert max(losses) < 0.75  # it begins at ln 2 and falls
    assert sum(losses[-10:]) / 10 < 0.01 * losses[0]
    assert figures["rank_max"] <= 32


def test_rank_is_added_where_the_loss_hardly_falls(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = {"max_steps": 40, "micro_batch": 2, "grad_accum": 1, "device": "cpu", "learning_rate": 1e-4}
    figures = finetune(preference_config(tiny_folder, pairs_file, run, training=training), console=QUIET)
    assert (figures["steps"], figures["ended"]) == (40, "budget")
    assert figures["rank_mean"] > 8
    assert figures["rank_mean"] <= 16  # the bound


def test_a_run_that_was_killed_ends_with_the_same_bytes(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(preference_config(tiny_folder, pairs_file, tmp_path / "whole"), console=QUIET)
    run, real, calls = tmp_path / "run", fit_module.accumulate, []

    def interrupted(session: Any, batches: Any, *shown: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(session, batches)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "accumulate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(preference_config(tiny_folder, pairs_file, run), console=QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "_write", lambda *_: pytest.fail("the reference was computed again"))
        finetune(Config.model_validate({"output": str(run)}), resume=True, console=QUIET)
    for name in ("reference.json", "adapter_last/adapter_model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    changed = write_rows(tmp_path / "changed.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9)
    text = (run / "config.yaml").read_text(encoding="utf-8").replace(pairs_file.as_posix(), changed.as_posix())
    (run / "config.yaml").write_text(text, encoding="utf-8")
    before = (run / "reference.json").read_bytes()
    with pytest.raises(QaromaError, match="its training data changed since"):
        finetune(Config.model_validate({"output": str(run)}), resume=True, console=QUIET)
    assert (run / "reference.json").read_bytes() == before


def test_the_reference_is_computed_once_and_goes_on_where_it_was_interrupted(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preference_config(tiny_folder, pairs_file, None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    add_reference(session_of(config, whole), QUIET)
    real, asked = Preference.log_probabilities, []

    def counted(task: Preference, model: Any, batch: Any) -> torch.Tensor:
        asked.append(batch.counted)
        if sum(asked) == 12:
            raise KeyboardInterrupt
        return real(task, model, batch)

    monkeypatch.setattr(Preference, "log_probabilities", counted)
    with pytest.raises(KeyboardInterrupt):
        add_reference(session_of(config, cut), QUIET)
    assert len(json.loads((cut / "reference.json").read_text())["values"]) == 10
    session = session_of(config, cut)
    asked.clear()
    asked.append(1)  # never twelve again
    add_reference(session, QUIET)
    assert sum(asked) - 1 == 30
    assert (cut / "reference.json").read_bytes() == (whole / "reference.json").read_bytes()
    pair = session.train[3]
    expected = [naive_log_probability(session.model, s).item() for s in pair.sequences.values()]
    assert pair.reference == pytest.approx(expected, rel=1e-4)
    asked.clear()
    add_reference(session_of(config, cut), QUIET)
    assert not asked
    for part in ('"values": [[-', '"key": "'):
        text = (whole / "reference.json").read_text()
        (cut / "reference.json").write_text(text.replace(part, f"{part}9"))
        asked[:] = [1]
        add_reference(session_of(config, cut), QUIET)
        assert sum(asked) - 1 == 40
        assert (cut / "reference.json").read_text() == text


def test_components_that_were_loaded_are_part_of_the_reference(
    tiny_folder: Path, data_file: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of practice: answers first, preferences on top; evaluation compares with the adapter of the answers."""
    first, run = tmp_path / "first", tmp_path / "run"
    finetune(make_config(tiny_folder, data_file, first, growth={}, training__max_steps=8), console=QUIET)
    config = preference_config(
        tiny_folder, pairs_file, run, model__adapter=str(first / "adapter"), data__validation=str(pairs_file)
    )
    finetune(config, console=QUIET)
    assert records(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    bare = json.loads((first / "adapter" / "growth.json").read_text())
    growth = json.loads((run / "adapter" / "growth.json").read_text())
    assert growth["start"] == {name: sum(parts) for name, parts in bare["components"].items()}
    session = session_of(config, run)
    pairs = session.train[:3]
    found = next(answer_log_probabilities(session.task, session.model, pairs, CPU, batch=3))
    unloaded = session_of(preference_config(tiny_folder, pairs_file, None), tmp_path / "unloaded")
    other = next(answer_log_probabilities(unloaded.task, unloaded.model, pairs, CPU, batch=3))
    assert found[0] != pytest.approx(other[0], rel=1e-3)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(pairs_file), "--device", "cpu", "--json"]) == 0
    best = min(records(run, "validation")[1:], key=lambda line: line["loss"])
    assert json.loads(capsys.readouterr().out)["margin"] == pytest.approx(best["margin"], rel=1e-3)


def test_evaluate_generate_and_export_take_such_a_run(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    changes = {"data__validation": str(pairs_file), "growth__trim": 0.0}  # what is saved is what was validated
    finetune(preference_config(tiny_folder, pairs_file, run, **changes), console=QUIET)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(pairs_file), "--device", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    best = min(records(run, "validation")[1:], key=lambda line: line["loss"])
    assert figures["rows"] == figures["examples"] == 40
    for name in ("loss", "accuracy", "margin"):
        assert figures[name] == pytest.approx(best[name], rel=1e-4)
    good = ["evaluate", str(run), "--data", str(pairs_file), "--feedback", "good", "--rows", "2", "--json"]
    assert main(good) == 0
    assert {"perplexity", "exact_match"} < set(json.loads(capsys.readouterr().out))
    assert main(["generate", str(run), "count 3", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(run), "--format", "peft", "--output", str(tmp_path / "out")]) == 0


def test_init_writes_the_task_and_preview_shows_both_answers(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "my.yaml"
    typed = ["init", "--model", str(tiny_folder), "--data", str(pairs_file), "--vram", "8GiB", "--yes"]
    assert main([*typed, "--output", str(target)]) == 0
    said = capsys.readouterr().out
    assert "task preference: the rows have a chosen and a rejected answer each" in said
    assert "--task preference" in said
    assert "\ntask: preference\n" in target.read_text(encoding="utf-8")
    assert main(["data", "preview", "--config", str(target), "--examples", "1"]) == 0
    said = capsys.readouterr().out
    assert "chosen: " in said
    assert "⟦it is 0<|im_end|>⟧" in said
    assert "rejected: " in said
    assert "⟦it is not 0 it is not 0 <|im_end|>⟧" in said
    assert "40 pairs of " in said


def test_a_plan_counts_two_sequences_a_pair(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", str(tiny_folder), "--seq-len", "64", "--memory", "1", "--json"]
    found = []
    for more in (["--task", "preference"], ["--micro-batch", "2"]):
        assert main([*asked, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["peak_bytes"] == found[1]["peak_bytes"]
    assert found[0]["sequences"] == 2
    assert main([*asked, "--task", "regression"]) == 2
    assert "expected causal-lm or preference" in capsys.readouterr().err


def test_length_and_rate_of_preferences() -> None:
    facts = DataFacts(320, [50] * 640, 512, validation_rows=20)
    values = {"model": {"name": "m"}, "data": {"train": [{"path": "x"}]}}
    found = {task: resolve(Config.model_validate({**values, "task": task}), facts)[0] for task in
             ("causal-lm", "preference")}  # fmt: skip
    answers, pairs = found["causal-lm"].training, found["preference"].training
    assert pairs.learning_rate == pytest.approx(answers.learning_rate / 40, rel=0.02)
    assert (answers.max_steps, pairs.max_steps) == (60, 60)
    assert pairs.patience == answers.patience == 3
    assert not found["preference"].growth.measured_rate
    many = DataFacts(3200, [50] * 640, 512)
    assert resolve(Config.model_validate({**values, "task": "preference"}), many)[0].training.max_steps == 200
    few = DataFacts(32, [50] * 640, 512)
    assert resolve(Config.model_validate({**values, "task": "preference"}), few)[0].training.max_steps == 6
    fixed = resolve(Config.model_validate({**values, "task": "preference", "method": "lora"}), facts)[0]
    assert fixed.training.learning_rate == 5e-6


GOOD_ROW = {"prompt": "a?", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({**GOOD_ROW, "rejected": "b"}, {}, "chosen and rejected are the same"),
        ({**GOOD_ROW, "rejected": None}, {}, "the field 'rejected' is missing"),
        ({**GOOD_ROW, "images": ["a.jpg"]}, {}, "the row has images, which a text run does not see"),
        ({**GOOD_ROW, "weight": 0.5}, {}, "an answer has a weight other than 1"),
        ({"chosen": "yes", "rejected": "no"}, {}, "texts without a question"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            {},
            "part at turn 1, which is no answer",
        ),
        ({"prompt": "a?", "completion": "b"}, {}, "is of the form completion, with one answer"),
        ({"prompt": "a?", "completion": "b", "label": True}, {}, "is of the form completion, with one answer"),
        (GOOD_ROW, {"data__feedback": "good"}, "got data.feedback good with --task preference"),
        (GOOD_ROW, {"data__train_on": "all"}, "got data.train_on all with --task preference"),
        (GOOD_ROW, {"data__format": "alpaca"}, "got data.format alpaca with --task preference"),
        (GOOD_ROW, {"data__packing": True}, "data.packing joins answers in one row"),
        (GOOD_ROW, {"task": "causal-lm"}, "or --task preference to train on both"),
    ],
)
def test_what_is_no_pair_is_said(
    tiny_folder: Path, tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    first = [] if "completion" in row else [GOOD_ROW]
    data = write_rows(tmp_path / "rows.jsonl", [*first, row])
    config = preference_config(tiny_folder, data, None, **{k: v for k, v in changes.items() if k != "task"})
    config.task = changes.get("task", "preference")
    with pytest.raises(QaromaError) as caught:
        prepare_data(config)
    assert said in str(caught.value)


def test_a_pair_that_is_too_long_goes_as_a_whole(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [GOOD_ROW] * 3 + [{**GOOD_ROW, "rejected": "d " * 60}, {**GOOD_ROW, "chosen": "the same " * 40,
            "rejected": "the same " * 40 + "end"}]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    kept = {}
    for how in ("drop", "truncate"):
        config = preference_config(tiny_folder, data, None, data__max_length=40, data__on_too_long=how)
        kept[how] = prepare_data(config)
    assert len(kept["drop"].train) == 3
    assert len(kept["truncate"].train) == 4  # cut, the last two would be the same
    assert max(s.tokens for pair in kept["truncate"].train for s in pair.sequences.values()) == 40


def test_memory_that_runs_out_does_not_change_the_reference_under_the_run(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last level packs the head, which changes every log-probability: a resumed run begins with a new reference."""

    def never(session: Any, batches: Any, *shown: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit_module, "accumulate", never)
    run = tmp_path / "run"
    with pytest.raises(QaromaError, match=r"Go on with a new one: .*--resume .* --memory 3"):
        finetune(preference_config(tiny_folder, pairs_file, run), console=QUIET)
    monkeypatch.undo()
    before = json.loads((run / "reference.json").read_text())["key"]
    config = Config.model_validate({"output": str(run), "training": {"memory": 3}})
    assert finetune(config, resume=True, console=QUIET)["steps"] == 8
    assert json.loads((run / "reference.json").read_text())["key"] != before
    assert records(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_what_was_saved_is_never_half(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    reference_module._write(path, "key", [(-1.5, -2.25), (-1e-3, -math.pi)])
    assert reference_module._read(path, "key") == [(-1.5, -2.25), (-1e-3, -math.pi)]
    assert reference_module._read(path, "other") == []
    path.write_text(path.read_text().replace("-2.25", "-2.26"))
    assert reference_module._read(path, "key") == []
