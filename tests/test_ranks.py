"""Several processes train the run of one: the same bytes, the same decisions, and one end for all of them.

With gloo on the CPU. One launch of two processes serves the whole default suite; it makes one job after the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from test_kill_and_resume import fingerprints
from test_labelled import make_config as labelled_config
from test_preference import preference_config
from test_training import make_config, records

from qaroma.cli import main
from qaroma.config.load import dump_config
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.runs.checkpoint import list_checkpoints, step_of
from qaroma.tasks.causal_lm import CausalLM
from qaroma.training import fit as fit_module
from qaroma.training import memory as memory_module
from qaroma.training import ranks as ranks_module
from qaroma.training.finetune import finetune
from qaroma.training.ranks import Ranks, joined

QUIET = Console(quiet=True)
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
STEPS = 8
MICRO_BATCHES = 4
PERTURBED = "model.layers.1.mlp.up_proj"

# Job: configuration, whether it is gone on with, and what goes wrong on the way.
Job = tuple[Config, bool, str | None]


# What happens in a rank. Each of two makes two of the language model's passes a step; but the first step here has one
# row, and the second rank none.


def at_pass(number: int, happens: Callable[[], None]) -> Any:
    """Something happens in a pass of this rank."""
    real, calls = CausalLM.step, Counter[str]()

    def step(task: CausalLM, model: Any, batch: Any) -> Any:
        calls["passes"] += 1
        if calls["passes"] == number:
            happens()
        return real(task, model, batch)

    return mock.patch.object(CausalLM, "step", step)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def counted(told: Path) -> ExitStack:
    """The messages that carry tensors of gradients, counted by their kind."""
    held, counts = ExitStack(), Counter[str]()

    def counting(kind: str) -> Callable[..., Any]:
        real = getattr(dist, kind)

        def message(tensor: Any, *where: Any, **named: Any) -> Any:
            counts[kind] += tensor.dtype == torch.float32
            return real(tensor, *where, **named)

        return message

    for kind in ("all_reduce", "broadcast", "send", "recv"):
        held.enter_context(mock.patch.object(dist, kind, counting(kind)))
    held.callback(lambda: told.with_suffix(".counts").write_text(json.dumps(counts)))
    return held


def relieved(told: Path) -> Any:
    real = memory_module.relieve

    def relieve(session: Any) -> str:
        done = real(session)
        told.with_suffix(".relieved").write_text(f"{session.level}")
        return done

    return mock.patch.object(memory_module, "relieve", relieve)


def perturbed() -> Any:
    """One number of one module changes by a little in the second step."""
    real, calls = fit_module.accumulate, Counter[str]()

    def accumulate(session: Any, *others: Any) -> Any:
        calls["steps"] += 1
        if calls["steps"] == 2:
            session.method.adapter.layers[PERTURBED].active_A.data[0, 0] += 1e-4
        return real(session, *others)

    return mock.patch.object(fit_module, "accumulate", accumulate)


def mischief(name: str | None, rank: int, told: Path) -> Any:
    held = ExitStack()
    if name == "counted":
        held.enter_context(counted(told))
    if name == "memory":
        held.enter_context(relieved(told))
        if rank == 1:
            held.enter_context(at_pass(5, out_of_memory))
    if name == "stopped" and rank == 1:
        held.enter_context(at_pass(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    if name == "perturbed" and rank == 1:
        held.enter_context(perturbed())
    if name == "hangs":
        held.enter_context(mock.patch.object(ranks_module, "STEP_MINUTES", 0.25))
        if rank == 1:
            held.enter_context(at_pass(5, lambda: time.sleep(40)))
    if name == "killed" and rank == 1:
        held.enter_context(at_pass(12, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    return held


def as_rank(rank: int, count: int, ports: Sequence[int], jobs: Sequence[Job], folder: Path) -> None:
    """One process of a launch, as torchrun would start it; leaves a file a job with how it ended."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    for number, (port, (config, resume, trouble)) in enumerate(zip(ports, jobs, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        told = folder / f"{number}-{rank}.txt"
        try:
            with mischief(trouble, rank, told):
                finetune(config, resume=resume, console=QUIET)
            told.write_text("done", encoding="utf-8")
        except (QaromaError, KeyboardInterrupt) as error:
            told.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def begin(count: int, jobs: Sequence[Job], folder: Path) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qaroma.training.finetune", "qaroma.method.aroma", "transformers.models.llama"])
    folder.mkdir(exist_ok=True)
    ports = free_ports(len(jobs))
    ranks = [context.Process(target=as_rank, args=(rank, count, ports, jobs, folder)) for rank in range(count)]
    for process in ranks:
        process.start()
    return ranks


def launch(count: int, jobs: Sequence[Job], folder: Path) -> dict[tuple[int, int], str]:
    """Make jobs on so many ranks; returns how each ended, by the number of the job and of the rank."""
    for process in begin(count, jobs, folder):
        process.join()
    names = [file.stem.split("-") for file in folder.glob("*.txt")]
    return {(int(job), int(rank)): (folder / f"{job}-{rank}.txt").read_text(encoding="utf-8") for job, rank in names}


def log(run: Path) -> list[dict[str, Any]]:
    """What a run says of itself, without what no two runs have alike."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    assert fingerprints(run) == fingerprints(other)
    assert log(run) == log(other)


def grown(model: Path, data: Path, run: Path, **changes: Any) -> Config:
    """A run of AROMA as published, with dropout and two growths inside."""
    usual: dict[str, Any] = {
        "growth__t_in": 3, "growth__eps_out": 1e-9, "growth__dropout": 0.1, "training__max_steps": STEPS,
        "training__micro_batch": 2, "training__grad_accum": MICRO_BATCHES, "training__evaluate_every": 4,
        "checkpoint__every": 4,
    }  # fmt: skip
    return make_config(model, data, run, **usual | changes)


def with_head(model: Path, data: Path, run: Path, **changes: Any) -> Config:
    usual = {"training__micro_batch": 2, "training__grad_accum": MICRO_BATCHES, "training__max_steps": STEPS}
    return labelled_config(model, data, run, **usual | changes)


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, encoder_folder: Path, data_file: Path, pairs: Path
) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    finetune(grown(tiny_folder, data_file, folder / "text"), console=QUIET)
    finetune(with_head(encoder_folder, pairs, folder / "labels", method="relora"), console=QUIET)
    assert {event["step"] for event in records(folder / "text", "growth")} == {3, 6, 8}
    assert {event["step"] for event in records(folder / "labels", "growth")} == {6, 8}
    return folder


JOBS = ("text", "labels", "memory", "perturbed", "stopped", "killed")


@pytest.fixture(scope="module")
def of_two(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, encoder_folder: Path, data_file: Path, pairs: Path
) -> tuple[Path, dict[tuple[str, int], str]]:
    """The jobs' folder, and how each job ended on each of two ranks; the second rank does not outlive the last job."""
    folder = tmp_path_factory.mktemp("two")

    def text(name: str, **changes: Any) -> Config:
        return grown(tiny_folder, data_file, folder / name, **changes)

    jobs: list[Job] = [
        (text("text"), False, "counted"),
        (with_head(encoder_folder, pairs, folder / "labels", method="relora"), False, None),
        (text("memory"), False, "memory"),
        (text("perturbed"), False, "perturbed"),
        (text("stopped", training__reduce="fast"), False, "stopped"),
        (text("killed"), False, "killed"),
    ]
    ended = launch(2, jobs, folder / "told")
    return folder, {(JOBS[job], rank): how for (job, rank), how in ended.items()}


@pytest.mark.parametrize("name", ["text", "labels"])
def test_two_processes_train_the_run_of_one(alone: Path, of_two: tuple[Path, dict], name: str) -> None:
    folder, ended = of_two
    assert ended[name, 0] == ended[name, 1] == "done"
    assert_same(folder / name, alone / name)


def test_one_sum_of_gradients_a_step(of_two: tuple[Path, dict]) -> None:
    """In order it goes from the first to the last rank, which gives it to all."""
    folder, _ = of_two
    first, last = (json.loads((folder / "told" / f"0-{rank}.counts").read_text()) for rank in (0, 1))
    nothing = {"all_reduce": 0}  # what is agreed on goes as whole numbers
    assert first == {"send": STEPS, "broadcast": STEPS, **nothing}
    assert last == {"recv": STEPS, "broadcast": STEPS, **nothing}


def test_a_rank_without_memory_takes_all_down_a_level_and_no_number_changes(
    alone: Path, of_two: tuple[Path, dict]
) -> None:
    folder, ended = of_two
    assert ended["memory", 0] == ended["memory", 1] == "done"
    assert [(folder / "told" / f"2-{rank}.relieved").read_text() for rank in (0, 1)] == ["1", "1"]
    assert_same(folder / "memory", alone / "text")


def test_a_rank_that_differs_is_named_at_the_next_growth(of_two: tuple[Path, dict]) -> None:
    folder, ended = of_two
    said = ended["perturbed", 0]
    assert said.startswith(f"QaromaError: rank 1 has another frozen.{PERTURBED}.A and ")
    assert "than rank 0 after step 3, where all ranks must have the same. Nothing of it was saved" in said
    assert f"--resume --output {(folder / 'perturbed').as_posix()}" in said
    assert ended["perturbed", 1].startswith("ToldElsewhereError")
    assert not records(folder / "perturbed", "growth")


def test_who_stops_one_rank_stops_all(of_two: tuple[Path, dict]) -> None:
    folder, ended = of_two
    assert ended["stopped", 0] == ended["stopped", 1] == "KeyboardInterrupt: "
    assert step_of(list_checkpoints(folder / "stopped" / "checkpoints")[-1]) == 4  # in which it was told


def test_a_killed_rank_ends_all_and_any_number_goes_on_to_the_same_bytes(
    alone: Path, of_two: tuple[Path, dict]
) -> None:
    folder, ended = of_two
    assert ("killed", 1) not in ended
    assert ended["killed", 0].startswith("QaromaError: another process of this run has ended, or has not answered for")
    assert "The run is safe up to step 6. With any number of processes go on with: qaroma" in ended["killed", 0]
    finetune(Config.model_validate({"output": str(folder / "killed")}), resume=True, console=QUIET)
    assert_same(folder / "killed", alone / "text")


def test_shares_are_neighbours_and_all_there_is() -> None:
    for count in (1, 2, 3, 4, 8):
        with mock.patch.object(dist, "new_group"):
            ranks = [Ranks(number, count) for number in range(count)]
        for items in (list(range(n)) for n in range(9)):
            shares = [rank.share(items) for rank in ranks]
            assert list(chain(*shares)) == items
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


# What takes longer: every method, four processes, kills at any moment, and the commands as they are typed.

OF_TEXT: dict[str, dict[str, Any]] = {
    "budget": {"growth": {"start_rank": 1, "max_rank": 4, "dropout": 0.1}, "training__learning_rate": 1e-6,
               "training__max_steps": 36, "data__packing": True, "data__max_length": 64},
    "product": {"growth__inner_criterion": "product", "growth__schedule": "independent", "growth__eps_out": 0.05},
    "gradient": {"growth__init": "gradient", "growth__window": 2},
    "relora": {"method": "relora"},
    "lora": {"method": "lora", "rank": 4},
    "peft-lora": {"method": "peft-lora", "rank": 4},
    "adalora": {"method": "adalora", "rank": 2, "training__max_steps": 16},
    "bf16": {"model__compute_dtype": "bf16", "training__memory": 2},
}  # fmt: skip
OF_LABELS: dict[str, dict[str, Any]] = {
    "head-aroma": {},
    "head-lora": {"method": "lora", "rank": 2},
    "head-adalora": {"method": "adalora", "rank": 2},
}


@pytest.fixture(scope="module")
def every_run(tiny_folder: Path, encoder_folder: Path, data_file: Path, pairs: Path, pairs_file: Path) -> Any:
    """Every kind of run, to be written into a folder."""

    def into(folder: Path) -> list[Config]:
        texts = [grown(tiny_folder, data_file, folder / name, **changes) for name, changes in OF_TEXT.items()]
        labels = [with_head(encoder_folder, pairs, folder / name, **changes) for name, changes in OF_LABELS.items()]
        preference = preference_config(tiny_folder, pairs_file, folder / "preference")
        preference.training.grad_accum = MICRO_BATCHES
        return [*texts, *labels, preference]

    return into


@pytest.fixture(scope="module")
def every_run_alone(tmp_path_factory: pytest.TempPathFactory, every_run: Any) -> Path:
    folder = tmp_path_factory.mktemp("every")
    for config in every_run(folder):
        finetune(config, console=QUIET)
    for name in ("budget", "product", "gradient", "relora", "head-aroma"):
        assert "commit" in {event["decision"] for event in records(folder / name, "growth")}
    assert len(records(folder / "adalora", "ranks")) > 1
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_method_trains_the_run_of_one(count: int, tmp_path: Path, every_run: Any, every_run_alone: Path) -> None:
    configs = every_run(tmp_path)
    ended = launch(count, [(config, False, None) for config in configs], tmp_path / "told")
    assert set(ended.values()) == {"done"}
    assert len(ended) == count * len(configs)
    for config in configs:
        assert_same(Path(config.output), every_run_alone / Path(config.output).name)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_rank_killed_at_any_moment_and_any_number_goes_on(
    number: int, tmp_path: Path, tiny_folder: Path, data_file: Path, alone: Path
) -> None:
    chance = random.Random(number)
    count, then = chance.choice([2, 4]), (2, 1, 4)[number % 3]
    victim, step, wait = chance.randrange(count), chance.randrange(STEPS), chance.uniform(0, 0.3)
    run = tmp_path / "run"
    ranks = begin(count, [(grown(tiny_folder, data_file, run), False, None)], tmp_path / "told")
    metrics, reached = run / "metrics.jsonl", f'{{"step": {step}, ' if step else '"validation"'
    while not (metrics.exists() and reached in metrics.read_text(encoding="utf-8")):
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    for process in ranks:
        process.join(120)
        assert process.exitcode is not None
    whole = (tmp_path / "told" / f"0-{(victim + 1) % count}.txt").read_text(encoding="utf-8") == "done"
    saved = step_of(list_checkpoints(run / "checkpoints")[-1])
    assert whole or saved >= step - 4  # a checkpoint is due every four steps
    config = Config.model_validate({"output": str(run)})
    config.training.device = "cpu"
    ended = launch(then, [(config, True, None)], tmp_path / "then")
    assert list(ended.values()) == ["done"] * then
    assert_same(run, alone / "text")


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_after_the_time_that_is_said(
    tmp_path: Path, tiny_folder: Path, data_file: Path, alone: Path
) -> None:
    config = grown(tiny_folder, data_file, tmp_path / "run")
    ended = launch(2, [(config, False, "hangs")], tmp_path / "told")
    for rank in (0, 1):
        assert "has not answered for 0.25 minutes" in ended[0, rank]
        assert "The run is safe up to step 3." in ended[0, rank]
    finetune(Config.model_validate({"output": config.output}), resume=True, console=QUIET)
    assert_same(tmp_path / "run", alone / "text")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2", "-m"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"],
    ],
)
def test_the_launchers_that_people_have(
    launcher: list[str], tmp_path: Path, tiny_folder: Path, data_file: Path, alone: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(grown(tiny_folder, data_file, tmp_path / "run")), encoding="utf-8")
    typed = [sys.executable, "-m", *launcher, "qaroma", "finetune", "--config", str(file), "--json"]
    done = subprocess.run(typed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS  # once
    assert_same(tmp_path / "run", alone / "text")


def test_a_launcher_that_would_split_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(QaromaError, match="every card holds the whole 4-bit base"), joined("auto"):
        pass


def test_more_cards_than_there_are_are_refused(
    tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    typed = ["finetune", "--model", str(tiny_folder), "--data", str(data_file), "--output", str(tmp_path / "run")]
    assert main([*typed, "--gpus", "2"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "got --gpus 2, but there are 1 CUDA cards to train on" in said
    assert "torchrun --nproc-per-node 2 -m qaroma finetune --device cpu" in said


@pytest.mark.slow
def test_gpus_starts_a_process_a_card_and_ctrl_c_saves(
    tiny_folder: Path, data_file: Path, tmp_path: Path, alone: Path
) -> None:
    """On a machine that is said to have two cards; without any, both processes train on the CPU."""
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    config = grown(tiny_folder, data_file, run)
    config.training.device = "auto"
    file.write_text(dump_config(config), encoding="utf-8")
    two_cards = "import sys, torch; torch.cuda.device_count = lambda: 2; from qaroma.cli import main; sys.exit(main())"
    typed = [sys.executable, "-c", two_cards, "finetune", "--config", str(file), "--gpus", "2"]
    process = subprocess.Popen(typed, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and '{"step": 2, ' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert f"go on with: qaroma finetune --resume --output {run.as_posix()}" in error
    typed[typed.index("--config") :] = ["--resume", "--output", str(run), "--gpus", "2"]
    assert subprocess.run(typed).returncode == 0
    assert_same(run, alone / "text")
