"""Runs of a comparison, each in a process of its own: taken as it is, gone on with, or begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from qaroma.compare.specs import PlannedRun
from qaroma.config.load import dump_config, flattened, lies_in, read_settings
from qaroma.config.schema import Config
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import write_atomically
from qaroma.runs.stop import StopRequest

# Where a run lies and what it trains on may change between two calls; what is trained may not.
_MAY_DIFFER = ("output", "checkpoint", "evaluation.report", "training.device", "training.memory", "training.track")


class Folder:
    """The folder of a comparison.

    ::

        FOLDER/<method>-s<seed>/     run directories
        FOLDER/configs/<run>.yaml    what each run was asked for
        FOLDER/logs/<run>.log        what each run printed
        FOLDER/hardware.json         what each run was measured on

    Args:
        path: made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.hardware = self.path / "hardware.json"

    def run(self, planned: PlannedRun) -> RunDirectory:
        return RunDirectory(self.path / planned.name)

    def asked(self, planned: PlannedRun) -> Path:
        return self.path / "configs" / f"{planned.name}.yaml"

    def log(self, planned: PlannedRun) -> Path:
        return self.path / "logs" / f"{planned.name}.log"

    def finished(self, planned: PlannedRun) -> bool:
        """Whether a run ended and its best adapter is there."""
        run = self.run(planned)
        return run.summary.is_file() and run.adapter.is_dir() and run.finished(run.last_step())

    def known_steps(self, runs: Sequence[PlannedRun]) -> int | None:
        """The step budget that earlier runs of this comparison were given."""
        for planned in runs:
            if self.run(planned).exists() and self.asked(planned).is_file():
                return read_settings(self.asked(planned), {}, []).training.max_steps
        return None

    def changed(self, planned: PlannedRun) -> list[str]:
        """What is asked of a run that began under other settings, one sentence for each setting."""
        run, asked = self.run(planned), self.asked(planned)
        if not run.exists():
            return []
        exact = asked.is_file()
        before = _flat(read_settings(asked if exact else run.config, {}, []))
        return [
            f"{planned.name}: {key} was {before.get(key)}, now {value}"
            for key, value in _flat(planned.config).items()
            if before.get(key) != value
            and (exact or value is not None)  # a run that was begun by hand has its values filled in
            and not lies_in(key, _MAY_DIFFER)
        ]


def carry_out(planned: PlannedRun, folder: Folder, console: Console, stop: StopRequest) -> str | None:
    """Run to the end what is not finished yet.

    Args:
        planned: with ``output`` set.
        folder: of the comparison.
        console: for the step that it is at, on a terminal.
        stop: passed on to the run, which saves its state first.

    Returns:
        None where the run ended well; else the last line that it printed.

    Raises:
        KeyboardInterrupt: the run was stopped on request; its state is saved.
    """
    run, asked, log = folder.run(planned), folder.asked(planned), folder.log(planned)
    for file in (asked, log):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(asked, dump_config(planned.config))
    # It ends with this process, however that ends: see qaroma.cli.attached.
    command = [sys.executable, "-m", "qaroma.cli.attached"]
    command += ["finetune", "--config", str(asked), "--output", str(run.path), "--json"]
    if run.exists():
        command.append("--resume")
    # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
    options: dict[str, Any] = {} if os.name == "nt" else {"start_new_session": True}
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=printed, stderr=subprocess.STDOUT, **options)
        code = _wait(process, run, planned.name, console, stop)
    if stop.requested and code != 0:
        raise KeyboardInterrupt
    if code == 0 and folder.finished(planned):
        return None
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with exit code {code} and printed nothing"


def _wait(process: subprocess.Popen[bytes], run: RunDirectory, name: str, console: Console, stop: StopRequest) -> int:
    passed_on = False
    shown = console.status(name) if console.is_terminal else None
    try:
        with shown or nullcontext():
            while True:
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    pass
                if stop.requested and not passed_on:
                    passed_on = True
                    if os.name != "nt":  # there the terminal's Ctrl-C has reached the run, too
                        process.send_signal(signal.SIGINT)
                if shown:
                    state = "saving; once more to stop at once" if passed_on else f"step {run.last_step()}"
                    shown.update(f"{name}: {state}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _flat(config: Config) -> dict[str, Any]:
    return flattened(config.model_dump(mode="json"))
