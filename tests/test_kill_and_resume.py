"""A run killed at any moment and resumed ends with the same bytes as one that was not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import make_config, records

from qaroma.config.load import dump_config
from qaroma.training.finetune import finetune

STEPS = 26
# Kills fall on random steps, of which 6, 12, 18, 24 are growth events (t_in 6) and 5, 10, ... checkpoints.
KILLS = sorted({6, 18, *random.Random(7).sample([s for s in range(2, STEPS) if s not in (6, 18)], 8)})


def fingerprints(run: Path) -> dict[str, str]:
    files = [*run.glob("adapter/*"), *run.glob("adapter_last/*")]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def config_for(model: Path, data: Path, run: Path, *, report: bool = False):
    return make_config(
        model, data, run,
        growth__eps_out=0.05, growth__dropout=0.1, growth__inner_criterion="product",
        training__max_steps=STEPS, training__evaluate_every=4, checkpoint__every=5, checkpoint__keep=2,
        evaluation__report=report,
    )  # fmt: skip


@pytest.fixture(scope="module")
def processes():
    """Forked from a server that has everything imported: a start costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qaroma.training.finetune", "qaroma.method.aroma", "transformers.models.llama"])
    return context


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: Path, data_file: Path, tmp_path_factory, processes) -> dict[str, str]:
    run = tmp_path_factory.mktemp("whole") / "run"
    process = processes.Process(target=finetune, args=(config_for(tiny_folder, data_file, run),))
    process.start()
    process.join()
    assert process.exitcode == 0
    decisions = [g["decision"] for g in records(run, "growth")]
    assert "commit" in decisions
    return fingerprints(run)


@pytest.mark.parametrize("kill_at", KILLS)
def test_killed_and_resumed_ends_with_the_same_bytes(
    kill_at: int,
    tiny_folder: Path,
    data_file: Path,
    tmp_path: Path,
    processes,
    uninterrupted: dict[str, str],
) -> None:
    run = tmp_path / "run"
    config = config_for(tiny_folder, data_file, run)
    process = processes.Process(target=finetune, args=(config,))
    process.start()
    metrics = run / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and f'{{"step": {kill_at}, ' in metrics.read_text(encoding="utf-8")):
        assert time.time() < deadline
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = processes.Process(target=finetune, args=(config,), kwargs={"resume": True})
    process.start()
    process.join()
    assert process.exitcode == 0
    assert fingerprints(run) == uninterrupted
    assert [s["step"] for s in records(run)] == list(range(1, STEPS + 1))


def test_ctrl_c_saves_and_says_how_to_go_on(
    tiny_folder: Path,
    data_file: Path,
    tmp_path: Path,
    uninterrupted: dict[str, str],
) -> None:
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config_for(tiny_folder, data_file, run, report=True)), encoding="utf-8")
    command = [sys.executable, "-m", "qaroma", "finetune"]
    process = subprocess.Popen([*command, "--config", str(file)], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '{"step": 8, ' in metrics.read_text(encoding="utf-8")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert f"qaroma finetune --resume --output {run.as_posix()}" in error.replace("\n", "")
    assert "Traceback" not in error
    stopped_at = max(json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines())
    assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    assert "It stopped before its end" in (run / "report.html").read_text(encoding="utf-8")
    resumed = subprocess.run([*command, "--resume", "--output", str(run), "--json"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == STEPS
    assert fingerprints(run) == uninterrupted
