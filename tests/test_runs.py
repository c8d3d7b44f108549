"""Run directories, atomic writes, checkpoints, the metrics log, the order of batches."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from qaroma.errors import QaromaError
from qaroma.runs import checkpoint as checkpoint_module
from qaroma.runs.checkpoint import Checkpoint, keep_newest, list_checkpoints, load_newest, save_checkpoint
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import directory_written_aside, write_atomically
from qaroma.runs.log import MetricsLog
from qaroma.training.batches import BatchPlan


def checkpoint(step: int) -> Checkpoint:
    tensors = {"a": torch.arange(4.0) + step, "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.get_rng_state()}
    return Checkpoint(step, tensors, {"x": 0.1 + step, "y": [1, None, "z"]})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = checkpoint(7)
    save_checkpoint(tmp_path, saved, fingerprint="f")
    loaded, warnings = load_newest(tmp_path, fingerprint="f")
    assert loaded is not None
    assert warnings == []
    assert (loaded.step, loaded.values) == (7, saved.values)
    assert all(torch.equal(loaded.tensors[k], saved.tensors[k]) for k in saved.tensors)
    assert {p.suffix for p in (tmp_path / "step-00000007").iterdir()} == {".safetensors", ".json"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, checkpoint(step), fingerprint="f")
    foreign = [tmp_path / "step-00000001-backup", tmp_path / "step-00000002.damaged", tmp_path / "step-00000099.old"]
    for path in foreign:
        path.mkdir()
    keep_newest(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000030"]
    assert all(path.is_dir() for path in foreign)


@pytest.mark.parametrize("damage", ["flip", "truncate", "json", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1), fingerprint="f")
    newest = save_checkpoint(tmp_path, checkpoint(2), fingerprint="f")
    file = newest / ("state.json" if damage == "json" else "state.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    loaded, warnings = load_newest(tmp_path, fingerprint="f")
    assert loaded is not None
    assert loaded.step == 1
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), fingerprint="f")
    with pytest.raises(QaromaError, match="another base model"):
        load_newest(tmp_path, fingerprint="g")


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "VERSION", 99)
        save_checkpoint(tmp_path, checkpoint(1), fingerprint="f")
    with pytest.raises(QaromaError, match=r"version 99.*upgrade qaroma"):
        load_newest(tmp_path, fingerprint="f")


@pytest.mark.parametrize("key", ["version", "base", "step", "values", "sha256"])
def test_whatever_of_the_newest_is_damaged_the_one_before_is_taken(key: str, tmp_path: Path) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, checkpoint(step), fingerprint="f")
    values = json.loads((path / "state.json").read_text())
    for damaged in (0, 99, None, "x", [], {**values, key: 3}):
        (path / "state.json").write_text(json.dumps({**values, key: damaged}))
        loaded, warnings = load_newest(tmp_path, fingerprint="f")
        assert loaded is not None
        assert (loaded.step, len(warnings)) == (1, 1)


def half_written(target: Path) -> None:
    with directory_written_aside(target) as aside:
        (aside / "x").write_text("2")
        raise OSError("disk full")


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with directory_written_aside(target) as aside:
        (aside / "x").write_text("1")
        assert not target.exists()
    with pytest.raises(OSError, match="full"):
        half_written(target)
    assert (target / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed to the disk and what is moved, by name, in order."""
    calls: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def flushed(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").resolve().name
        calls.append(("fsync", re.sub(r"\.part-[0-9a-f]{8}$", ".part", name)))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        calls.append(("move", Path(target).name))
        replace(source, target)

    def renamed(source: Path, target: Path) -> Path:
        calls.append(("move", Path(target).name))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_what_is_moved_into_place_is_on_the_disk_before(tmp_path: Path, system_calls: list[tuple[str, str]]) -> None:
    write_atomically(tmp_path / "config.yaml", "x: 1\n")
    assert system_calls == [("fsync", "config.yaml.part"), ("move", "config.yaml"), ("fsync", tmp_path.name)]
    system_calls.clear()
    with directory_written_aside(tmp_path / "adapter") as aside:
        (aside / "a").write_text("1")
        (aside / "b").write_text("2")
    assert sorted(system_calls[:2]) == [("fsync", "a"), ("fsync", "b")]
    assert system_calls[2:] == [("fsync", "adapter.part"), ("move", "adapter"), ("fsync", tmp_path.name)]
    system_calls.clear()
    save_checkpoint(tmp_path, checkpoint(1), fingerprint="f")
    assert sorted(system_calls[:2]) == [("fsync", "state.json"), ("fsync", "state.safetensors")]
    assert system_calls[2:4] == [("fsync", "step-00000001.part"), ("move", "step-00000001")]


def test_metrics_are_cut_back_and_survive_a_torn_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        log.write({"step": step, "loss": 0.1 * step})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    log.cut_back(3)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1, 2, 3]


def test_run_directories_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunDirectory.unused("a model/my data")
    assert first.path == Path("runs/a-model-my-data")
    first.create("x: 1\n")
    assert RunDirectory.unused("a model/my data").path == Path("runs/a-model-my-data-2")
    with pytest.raises(QaromaError, match="--resume"):
        first.create("x: 2\n")
    assert first.config.read_text() == "x: 1\n"


def test_batches_cover_an_epoch_and_depend_only_on_the_step() -> None:
    lengths = torch.randint(5, 500, (1003,)).tolist()
    plan = BatchPlan(lengths, micro_batch=2, grad_accum=4, seed=3)
    steps = [plan.step(s) for s in range(2 * plan.steps_per_epoch)]
    for epoch in (steps[: plan.steps_per_epoch], steps[plan.steps_per_epoch :]):
        assert sorted(i for step in epoch for micro in step for i in micro) == list(range(1003))
    assert steps[0] != steps[plan.steps_per_epoch]
    assert BatchPlan(lengths, micro_batch=2, grad_accum=4, seed=3).step(77) == steps[77]
    assert BatchPlan(lengths, micro_batch=2, grad_accum=4, seed=4).step(77) != steps[77]


def test_steps_hold_the_same_examples_however_they_are_cut() -> None:
    lengths = torch.randint(5, 500, (100,)).tolist()
    eight = BatchPlan(lengths, micro_batch=8, grad_accum=1, seed=0)
    ones = BatchPlan(lengths, micro_batch=1, grad_accum=8, seed=0)
    for step in range(30):
        assert [i for micro in eight.step(step) for i in micro] == [i for micro in ones.step(step) for i in micro]


def test_examples_of_a_step_have_similar_lengths() -> None:
    lengths = torch.randint(5, 500, (1000,)).tolist()
    plan = BatchPlan(lengths, micro_batch=8, grad_accum=1, seed=0)
    spread = [max(lengths[i] for i in s[0]) - min(lengths[i] for i in s[0]) for s in map(plan.step, range(125))]
    assert sum(spread) / len(spread) < 20  # of 495; at random it would be 385
