"""The job file and the page for several GPUs: commands that we have, and a job that goes on where it was stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_cli import COMMANDS
from torch.distributed.run import get_args_parser

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Slurm's commands and torchrun, as far as the job knows them. torchrun waits for SIGTERM, as a run that trains.
STAND_INS = {
    "srun": 'while [ "$1" != torchrun ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> scontrol.log; fi',
    "scancel": 'echo "$@" > scancel.log; kill -TERM $(cat torchrun.pid)',
    "torchrun": 'printf "%s\\n" "$@" > torchrun.log; trap "sleep 0.2; touch saved; exit 1" TERM\n'
    'echo $$ > torchrun.pid; [ -e quick ] && exit 0; for i in {1..1000}; do sleep 0.05; done',
}  # fmt: skip


def parsed(words: list[str]) -> dict[str, object]:
    """The parameters of a command of ours as it is typed after ``qaroma``."""
    command = COMMANDS[(words[0],)]
    return command.make_context(words[0], words[1:]).params


def launched(words: list[str]) -> dict[str, object]:
    """Those of the command that a torchrun starts."""
    launcher = get_args_parser().parse_args(words)
    assert launcher.module
    assert launcher.training_script == "qaroma"
    return parsed(launcher.training_script_args)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A folder with the stand-ins, and the environment of a job in it."""
    if os.name == "nt":
        pytest.skip("the job is a shell script")
    for name, script in STAND_INS.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        file.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "70012", "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "8"}  # fmt: skip


def test_a_slurm_job_begins_a_run_stops_it_before_its_time_is_over_and_goes_on(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    job = ["bash", str(EXAMPLES / "slurm.sh"), "mine.yaml", "runs/mine"]
    with subprocess.Popen(job, cwd=tmp_path, env=cluster) as process:
        while not (tmp_path / "torchrun.pid").is_file() or not (tmp_path / "torchrun.pid").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # as a preemption's: the run has one of its own
        process.send_signal(signal.SIGUSR1)
    assert process.returncode == 1
    assert (tmp_path / "saved").is_file()
    assert (tmp_path / "scancel.log").read_text() == "--signal=TERM 70012.0\n"
    assert (tmp_path / "scontrol.log").read_text() == "requeue 70012\n"
    words = (tmp_path / "torchrun.log").read_text().splitlines()
    assert "--rdzv-endpoint=node7:29512" in words
    first = launched(words)
    assert (first["config"], first["output"], first["resume"]) == ("mine.yaml", "runs/mine", False)

    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    (tmp_path / "quick").touch()
    subprocess.run(job, cwd=tmp_path, env=cluster, check=True)
    assert launched((tmp_path / "torchrun.log").read_text().splitlines()) == {**first, "resume": True}
    assert (tmp_path / "scontrol.log").read_text() == "requeue 70012\n"


def test_the_commands_of_the_page_are_ones_that_we_have() -> None:
    text = (EXAMPLES / "gpus.md").read_text(encoding="utf-8").replace("\\\n", " ")
    typed = [shlex.split(line.removeprefix("    ")) for line in text.splitlines() if line.startswith("    ")]
    ours = [words[1:] for words in typed if words[0] == "qaroma"]
    assert {"plan", "doctor", "compare"} <= {words[0] for words in ours}
    for words in ours:
        parsed(words)
    launchers = [words[1:] for words in typed if words[0] == "torchrun"]
    assert launchers
    for words in launchers:
        launched(words)
