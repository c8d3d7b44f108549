"""Several processes train the run of one: the same bytes, the same decisions, and one end for all of them.

With gloo on the CPU. One launch of two processes serves the whole default suite; it makes one job after the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
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
from test_training import make_config, records

from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.runs.checkpoint import list_checkpoints, step_of
from qaroma.tasks.causal_lm import CausalLM
from qaroma.training import fit as fit_module
from qaroma.training import memory as memory_module
from qaroma.training.finetune import finetune
from qaroma.training.ranks import Ranks, require_shares

QUIET = Console(quiet=True)
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
STEPS = 8
MICRO_BATCHES = 4
PERTURBED = "model.layers.1.mlp.up_proj"

# Job: configuration, whether it is gone on with, and what goes wrong on the way.
Job = tuple[Config, bool, str | None]


# What happens in a rank. Of the language model's passes each rank of two makes two a step.


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
    assert step_of(list_checkpoints(folder / "stopped" / "checkpoints")[-1]) == 3  # the pass was of the third step


def test_a_killed_rank_ends_all_and_any_number_goes_on_to_the_same_bytes(
    alone: Path, of_two: tuple[Path, dict]
) -> None:
    folder, ended = of_two
    assert ("killed", 1) not in ended
    assert ended["killed", 0].startswith("QaromaError: another process of this run has ended, or has not answered for")
    assert "The run is safe up to step 5. With any number of processes go on with: qaroma" in ended["killed", 0]
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


@pytest.mark.parametrize(("micro_batches", "count", "nearest"), [(5, 2, 4), (3, 4, 4), (10, 4, 8), (11, 4, 12)])
def test_micro_batches_that_cannot_be_shared_are_refused(micro_batches: int, count: int, nearest: int) -> None:
    with pytest.raises(QaromaError, match=rf"which {count} processes cannot share evenly; type --grad-accum {nearest}"):
        require_shares(micro_batches, count)
    require_shares(nearest, count)
