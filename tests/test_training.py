"""The loop on a tiny 4-bit Llama: from the command's function to the adapter folder."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qaroma.config.decisions import DataFacts
from qaroma.config.presets import resolve
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.model.documents import APART
from qaroma.model.found import find_model
from qaroma.runs.adapter import read_adapter
from qaroma.runs.directory import RunDirectory
from qaroma.training import fit as fit_module
from qaroma.training.finetune import finetune
from qaroma.training.memory import forbid_spilling
from qaroma.training.prepare import prepare_data
from qaroma.training.samples import Sampler
from qaroma.training.setup import build_session

QUIET = Console(quiet=True)


def make_config(model: Path, data: Path, output: Path | None, **changes) -> Config:
    values = {
        "model": {"name": str(model), "compute_dtype": "fp32"},
        "data": {"train": [{"path": str(data)}]},
        "growth": {"t_in": 6, "check_every": 2, "warmup": 1, "restart_warmup": 1},
        "training": {"max_steps": 20, "micro_batch": 4, "grad_accum": 2, "device": "cpu", "learning_rate": 1e-2},
        "checkpoint": {"every": 5},
        "evaluation": {"report": False},
        "output": str(output) if output else None,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = dict(value) if isinstance(value, dict) else value
    return Config.model_validate(values)


def records(run: Path, event: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.get("event") == event]


def session_of(config: Config, tmp_path: Path):
    return build_session(prepare_data(config), RunDirectory(tmp_path / "unused"))


def test_a_run_leaves_what_it_should(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    figures = finetune(make_config(tiny_folder, data_file, run, growth__eps_out=1e-9), console=QUIET)
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapter", "adapter_last",
    }  # fmt: skip
    steps = records(run)
    assert [s["step"] for s in steps] == list(range(1, 21))
    assert set(steps[0]) == {
        "step", "loss", "learning_rate", "mean_rank", "active_modules", "trainable_parameters", "tokens_per_second",
        "seconds", "memory_bytes",
    }  # fmt: skip
    growth = records(run, "growth")
    assert set(growth[0]) == {"event", "step", "module", "component", "inner", "outer", "decision"}
    assert [g["decision"] for g in growth].count("keep") == 14  # at the budget every module keeps its last one
    validation = records(run, "validation")
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert figures["validation_loss"] == min(v["loss"] for v in validation[1:])
    assert figures["steps"] == 20
    assert figures["rank_min"] >= 3


def test_a_run_stops_by_itself_when_every_module_is_done(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(tiny_folder, data_file, run, growth__eps_out=0.25, training__max_steps=200)
    figures = finetune(config, console=QUIET)
    assert figures["ended"] == "grown"
    assert figures["steps"] < 200
    last = records(run)[-1]
    assert last["trainable_parameters"] == last["active_modules"] == 0
    done = {g["module"] for g in records(run, "growth") if g["decision"] == "done"}
    assert len(done) == 14
    assert figures["trainable_parameters_mean"] < figures["trainable_parameters_start"]


def test_packed_rows_train_without_a_mask(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = make_config(tiny_folder, data_file, tmp_path / "run", data__packing=True, training__max_steps=6)
    assert session_of(config, tmp_path).model.config._attn_implementation == APART
    finetune(config, console=QUIET)
    losses = [step["loss"] for step in records(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["aroma", "lora"])
def test_one_by_eight_equals_eight_by_one(tiny_folder: Path, data_file: Path, tmp_path: Path, method: str) -> None:
    """Gradients are those of the mean over the step's trained tokens, however the step is cut."""
    gradients, losses = [], []
    for micro, accum in ((8, 1), (1, 8), (4, 2)):
        config = make_config(
            tiny_folder, data_file, None, method=method, training__micro_batch=micro, training__grad_accum=accum
        )
        session = session_of(config, tmp_path)
        full = next(step for step in map(session.plan.step, range(99)) if sum(map(len, step)) == 8)
        batches = [session.task.collate([session.train[i] for i in indices]) for indices in full]
        assert len(batches) == accum
        losses.append(fit_module.accumulate(session, batches)[0]["loss"])
        gradients.append(session.method.trainer.optimiser.gradients.clone())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient_and_evaluation_in_between_neither(
    tiny_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Train, evaluate, train: on CPUs with AVX512-BF16 a 4-bit layer's own forward would break the second pass."""
    gradients = []
    for level in (1, 0):
        config = make_config(tiny_folder, data_file, None, training__memory=level)
        config.model.compute_dtype = "bf16"
        session = session_of(config, tmp_path)
        batches = [session.task.collate([session.train[i] for i in indices]) for indices in session.plan.step(0)]
        for _ in range(2):
            session.model.train()
            fit_module.accumulate(session, batches)
            gradients.append(session.method.trainer.optimiser.gradients.clone())
            session.method.trainer.optimiser.zero_grad()
            fit_module.validation_metrics(session)
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        assert torch.equal(other, gradients[0])


def test_the_base_never_changes(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    session = session_of(make_config(tiny_folder, data_file, tmp_path / "r", growth__eps_out=0.2), tmp_path)
    layers = session.method.adapter.layers.values()

    def base_bytes() -> dict[str, bytes]:
        state = {k: t for k, t in session.model.state_dict().items() if not k.endswith(("active_A", "active_B"))}
        return {k: t.contiguous().view(torch.uint8).numpy().tobytes() for k, t in state.items()}

    before = base_bytes()
    assert any(layer.base.weight.dtype == torch.uint8 for layer in layers)  # packed 4-bit weights
    grown = 0
    for step in range(30):
        batches = [session.task.collate([session.train[i] for i in indices]) for indices in session.plan.step(step)]
        fit_module.accumulate(session, batches)
        grown += len(session.method.step())
        if session.method.finished:
            break
    assert grown > 14
    assert base_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_goes_back_to_the_last_good_state(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original, calls = fit_module.accumulate, []

    def poisoned(session, batches, *_):
        calls.append(1)
        figures, norm = original(session, batches)
        return {"loss": float("nan")} if len(calls) == 8 else figures, norm

    monkeypatch.setattr(fit_module, "accumulate", poisoned)
    with pytest.raises(QaromaError, match=r"loss of step 8 is nan .*rows\.jsonl:\d+.*--resume --output"):
        finetune(make_config(tiny_folder, data_file, run), console=QUIET)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000000", "step-00000005"]
    monkeypatch.undo()
    config = Config.model_validate({"output": str(run)})
    assert finetune(config, resume=True, console=QUIET)["steps"] == 20
    assert [s["step"] for s in records(run)] == list(range(1, 21))


def test_patience_ends_a_run_that_no_longer_improves(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_folder, data_file, tmp_path / "run", method="lora",
        training__learning_rate=1e-9, training__patience=2, training__evaluate_every=2, training__max_steps=50,
    )  # fmt: skip
    figures = finetune(config, console=QUIET)
    assert figures["ended"] == "patience"
    assert figures["steps"] < 50


def test_plain_lora_runs_through_the_same_loop(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = make_config(tiny_folder, data_file, tmp_path / "run", method="lora", rank=4)
    figures = finetune(config, console=QUIET)
    assert figures["growth_events"] == 0
    assert (figures["rank_min"], figures["rank_max"]) == (4, 4)
    assert figures["validation_loss"] < figures["validation_loss_before"]


def test_a_second_run_never_overwrites_the_first(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(make_config(tiny_folder, data_file, run, training__max_steps=2), console=QUIET)
    before = (run / "adapter_last" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(QaromaError, match="already holds a run; type --resume"):
        finetune(make_config(tiny_folder, data_file, run, training__max_steps=2), console=QUIET)
    assert (run / "adapter_last" / "adapter_model.safetensors").read_bytes() == before


def test_resuming_with_other_settings_is_refused_by_name(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(make_config(tiny_folder, data_file, run, training__max_steps=2), console=QUIET)
    with pytest.raises(QaromaError, match=r"growth\.t_in was 6, now 7"):
        finetune(make_config(tiny_folder, data_file, run, growth__t_in=7), resume=True, console=QUIET)
    with pytest.raises(QaromaError, match="holds no run"):
        finetune(make_config(tiny_folder, data_file, tmp_path / "other"), resume=True, console=QUIET)


def test_a_bad_row_is_reported_before_any_weight_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n{broken\n', encoding="utf-8")
    monkeypatch.setattr("qaroma.training.setup.load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(QaromaError, match=r"(?s)bad\.jsonl:2.*bad\.jsonl:3|bad\.jsonl:3.*bad\.jsonl:2"):
        finetune(make_config(tiny_folder, bad, tmp_path / "run"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_out_of_memory_saves_memory_and_goes_on_from_where_it_was(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels first, then micro-batches; the losses are those of a run that fits."""
    whole = make_config(tiny_folder, data_file, tmp_path / "whole")
    finetune(whole, console=QUIET)
    original, seen = fit_module.accumulate, []

    def crowded(session, batches, *_):
        seen.append((session.level, session.plan.micro_batch))
        if seen.count(seen[-1]) == 3 and seen[-1] in ((0, 4), (1, 4), (2, 4)):
            session.method.trainer.optimiser.gradients.normal_()  # half a step's gradients
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(session, batches)

    monkeypatch.setattr(fit_module, "accumulate", crowded)
    run = tmp_path / "crowded"
    finetune(make_config(tiny_folder, data_file, run), console=QUIET)
    assert list(dict.fromkeys(seen)) == [(0, 4), (1, 4), (2, 4), (2, 2)]
    ours, theirs = ([s["loss"] for s in records(r)] for r in (run, tmp_path / "whole"))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("name", ["validation_metrics", "accumulate", "record"])
def test_out_of_memory_outside_the_gradients_is_relieved_too(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The error has another name where a kernel's library, or pinned memory, finds none."""
    owner = Sampler if name == "record" else fit_module
    original, failed = getattr(owner, name), []

    def once(*arguments):
        if not failed:
            failed.append(name)
            raise RuntimeError("CUDA error: out of memory")
        return original(*arguments)

    monkeypatch.setattr(owner, name, once)
    said = Console(record=True, width=200, quiet=False, file=io.StringIO())
    config = make_config(
        tiny_folder, data_file, tmp_path / "run", evaluation__prompts=["count 1"], evaluation__max_new_tokens=2,
        training__max_steps=2,
    )  # fmt: skip
    assert finetune(config, console=said)["steps"] == 2
    what = {"validation_metrics": "validation", "accumulate": "step 1", "record": "samples"}[name]
    assert f"{what}: out of memory; going on at memory level 1" in said.export_text()


def test_on_windows_a_run_takes_no_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6, 8))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: taken.append(share))
    for platform in ("linux", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        forbid_spilling(torch.device("cuda"))
    assert taken == [0.75]


def test_out_of_memory_with_nothing_left_to_save_is_a_clear_error(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(session, batches, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit_module, "accumulate", never)
    with pytest.raises(QaromaError, match=r"out of memory at the smallest memory level.*--max-length \(now 64\)"):
        finetune(make_config(tiny_folder, data_file, tmp_path / "run"), console=QUIET)


@pytest.mark.parametrize(
    ("schedule", "gibibytes", "level"),
    [
        ("lockstep", 80, 0),
        ("lockstep", 12, 1),
        ("lockstep", 6.5, 2),
        ("lockstep", 5.1, 3),
        ("budget", 5.6, 3),
        pytest.param("budget", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_auto_takes_the_fastest_level_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, gibibytes: float, level: int
) -> None:
    """LLaMA-3-8B at 2,048 tokens, by the memory that is free; rank 16 in training takes 0.5 GB more than rank 1."""
    from qaroma.plan.shapes import model_config
    from qaroma.training import memory

    model_config("llama3-8b").save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(gibibytes * 2**30))
    monkeypatch.setattr(memory, "resolve_dtype", lambda *_: torch.bfloat16)  # no card is here to ask
    monkeypatch.setattr(memory, "wants_repeated_keys", lambda *_: False)
    config = Config.model_validate(
        {"model": {"name": str(tmp_path)}, "data": {"max_length": 2048}, "training": {"micro_batch": 1},
         "growth": {"schedule": schedule}}
    )  # fmt: skip
    resolved, _ = resolve(config, DataFacts(100, [2048], None))
    assert memory.choose_level(resolved, find_model(tmp_path), torch.device("cuda")) == level


def test_what_fits_at_no_level_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qaroma.plan.shapes import model_config
    from qaroma.training import memory

    model_config("llama3-8b").save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 2**30)
    config = Config.model_validate({"model": {"name": str(tmp_path)}, "data": {"max_length": 512}})
    resolved, _ = resolve(config, DataFacts(100, [512], None))
    with pytest.raises(QaromaError, match=r"does not fit in 3\.0 GiB with micro-batches of 2048 tokens"):
        memory.choose_level(resolved, find_model(tmp_path), torch.device("cpu"))


def test_the_figure_that_chose_the_best_adapter_stays(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(make_config(tiny_folder, data_file, run, training__max_steps=2), console=QUIET)
    config = Config.model_validate({"output": str(run), "evaluation": {"metric": "f1"}})
    with pytest.raises(QaromaError, match=r"evaluation\.metric was None, now f1"):
        finetune(config, resume=True, console=QUIET)


def test_a_run_that_stopped_at_its_first_step_logs_the_beginning_once(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(fit_module, "accumulate", lambda *_: ({"loss": float("nan")}, 1.0))
    with pytest.raises(QaromaError, match="loss of step 1 is nan"):
        finetune(make_config(tiny_folder, data_file, run, training__max_steps=2), console=QUIET)
    monkeypatch.undo()
    finetune(Config.model_validate({"output": str(run)}), resume=True, console=QUIET)
    assert [v["step"] for v in records(run, "validation")].count(0) == 1
    assert [r["step"] for r in records(run, "ranks")].count(0) == 1


@pytest.mark.parametrize("memory", ["auto", "1"])
def test_a_model_is_looked_up_once(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    from transformers import AutoConfig

    from qaroma.model import base, builtin, found

    calls = {"resolve_model": 0, "AutoConfig": 0}
    resolve_place, read_config = builtin.resolve_model, AutoConfig.from_pretrained

    def counted_place(*arguments):
        calls["resolve_model"] += 1
        return resolve_place(*arguments)

    def counted_config(*arguments, **named):
        calls["AutoConfig"] += 1
        return read_config(*arguments, **named)

    for module in (base, builtin, found):
        monkeypatch.setattr(module, "resolve_model", counted_place)
    monkeypatch.setattr(AutoConfig, "from_pretrained", counted_config)
    config = make_config(tiny_folder, data_file, tmp_path / "run", training__max_steps=2, training__memory=memory)
    finetune(config, console=QUIET)
    assert calls == {"resolve_model": 1, "AutoConfig": 1}


def test_the_default_growth_runs_reports_and_goes_on(tiny_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = make_config(tiny_folder, data_file, tmp_path / "run", growth={"start_rank": 1, "max_rank": 4})
    config.training.learning_rate, config.training.max_steps = 1e-6, 36  # too small to learn by: rank is added
    config.checkpoint.every, config.evaluation.report = 12, True
    figures = finetune(config, console=QUIET)
    assert (figures["steps"], figures["ended"]) == (36, "budget")
    grown = records(tmp_path / "run", "growth")
    assert {(event["step"], event["decision"]) for event in grown} == {(16, "commit"), (36, "keep")}
    assert all(event["inner"] is event["outer"] is None for event in grown)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Rank at first, at most" in page
    [trimmed] = records(tmp_path / "run", "trim")
    adapter, last = (read_adapter(tmp_path / "run" / name) for name in ("adapter", "adapter_last"))
    assert sum(last.info.ranks().values()) == trimmed["before"] > trimmed["after"]
    assert sum(adapter.info.ranks().values()) == trimmed["after"]
    assert trimmed["figures"]["loss"] == figures["metric_best"] == figures["validation_loss"]
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert finetune(Config.model_validate({"output": config.output}), resume=True, console=QUIET)["steps"] == 36
    assert records(tmp_path / "run", "trim") == [trimmed]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_files_named_for_validation_are_validated_on(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in {"part-1": 6, "valid": 2, "my_test": 3}.items():
        rows = [json.dumps({"prompt": f"{name} {n}", "completion": str(n), "id": n}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = prepare_data(make_config(tiny_folder, folder, None))
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert data.notes[1:4] == [
        f"{folder}: my_test.jsonl left out, held out by their names; name a file to train on it.",
        f"{folder}: valid.jsonl held out to validate on; name a file to train on it.",
        "ignored keys: id",
    ]


def test_tokens_beyond_the_embedding_are_refused_before_any_weight_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 60}), encoding="utf-8")
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "hello", "completion": "there"}', encoding="utf-8")
    with pytest.raises(QaromaError, match=r"a\.jsonl:1 has the token .* embedding has 60 rows"):
        prepare_data(make_config(base, file, None))
