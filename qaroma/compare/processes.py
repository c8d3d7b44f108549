"""Runs of a comparison, each in a process of its own: taken as it is, gone on with, or begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from qaroma.compare.machine import hardware
from qaroma.compare.specs import PlannedRun
from qaroma.config.load import dump_config, flattened, lies_in, read_settings
from qaroma.config.schema import Config
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import read_json, write_atomically
from qaroma.runs.stop import StopRequest

Ended = Callable[[PlannedRun, str | None], None]

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

    def remember_hardware(self, planned: PlannedRun, card: int) -> None:
        """Note what a run is measured on; ``card`` is its GPU, as torch counts them."""
        self.path.mkdir(parents=True, exist_ok=True)
        known = read_json(self.hardware)
        known[planned.name] = hardware(planned.config.training.device, card)
        write_atomically(self.hardware, json.dumps(known, indent=2))

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


def carry_out(
    todo: Sequence[PlannedRun], folder: Folder, console: Console, stop: StopRequest, ended: Ended,
    cards: Sequence[str | None] = (None,),
) -> None:  # fmt: skip
    """Run to the end what is not finished yet, one run on each card at a time.

    Args:
        todo: runs with ``output`` set.
        folder: of the comparison.
        console: for what begins, and on a terminal for the steps that they are at.
        stop: passed on to the runs at work, which save their state first; none is begun after it.
        ended: called with each run that came to its end: None where that was well, else the last line that it printed.
        cards: what CUDA_VISIBLE_DEVICES is for the runs on each; None leaves it as it is.

    Raises:
        KeyboardInterrupt: stopped on request.
    """
    waiting, free = list(enumerate(todo, start=1)), list(cards)
    working: list[RunProcess] = []
    shown = console.status("") if console.is_terminal else None
    try:
        with shown or nullcontext():
            while working or (waiting and not stop.requested):
                while waiting and free and not stop.requested:
                    (number, planned), card = waiting.pop(0), free.pop(0)
                    place = "" if card is None else f" on GPU {card}"
                    console.print(f"{number}/{len(todo)}  {planned.name}{place}", highlight=False, markup=False)
                    folder.remember_hardware(planned, cards.index(card))
                    working.append(RunProcess(planned, folder, card))
                if working:
                    working[0].wait(seconds=0.5)
                for run in [run for run in working if run.code is not None]:
                    working.remove(run)
                    free.append(run.card)
                    run.end()
                    if run.code == 0 or not stop.requested:
                        ended(run.planned, run.problem())
                if stop.requested:
                    for run in working:
                        run.ask_to_stop()
                if shown:
                    shown.update("; ".join(run.state() for run in working))
    finally:
        for run in working:
            run.end()
    if stop.requested:
        raise KeyboardInterrupt


class RunProcess:
    """A run at work. It ends with this process, however that ends: see :mod:`qaroma.cli.attached`.

    Args:
        planned: with ``output`` set.
        folder: of the comparison.
        card: what CUDA_VISIBLE_DEVICES is for it; None leaves it as it is.
    """

    def __init__(self, planned: PlannedRun, folder: Folder, card: str | None = None) -> None:
        self.planned, self.folder, self.card, self._asked_to_stop = planned, folder, card, False
        run, asked, log = folder.run(planned), folder.asked(planned), folder.log(planned)
        for file in (asked, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(asked, dump_config(planned.config))
        command = [sys.executable, "-m", "qaroma.cli.attached"]
        command += ["finetune", "--config", str(asked), "--output", str(run.path), "--json"]
        if run.exists():
            command.append("--resume")
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
        options: dict[str, Any] = {} if os.name == "nt" else {"start_new_session": True}
        if card is not None:
            options["env"] = {**os.environ, "CUDA_VISIBLE_DEVICES": card}
        with log.open("w", encoding="utf-8") as printed:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=printed, stderr=subprocess.STDOUT, **options
            )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it is at work."""
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)

    def ask_to_stop(self) -> None:
        """Pass a request to stop on, once; the run saves its state first."""
        if not self._asked_to_stop and os.name != "nt":  # there the terminal's Ctrl-C has reached the run, too
            self._process.send_signal(signal.SIGINT)
        self._asked_to_stop = True

    def state(self) -> str:
        """What it is doing, for a terminal."""
        if self._asked_to_stop:
            return f"{self.planned.name}: saving; once more to stop at once"
        return f"{self.planned.name}: step {self.folder.run(self.planned).last_step()}"

    def problem(self) -> str | None:
        """Why it did not end well: the last line that it printed; None where it did."""
        if self.code == 0 and self.folder.finished(self.planned):
            return None
        log = self.folder.log(self.planned).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {self.code} and printed nothing"

    def end(self) -> None:
        """Kill it where it has not ended by itself, and let go of it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def _flat(config: Config) -> dict[str, Any]:
    return flattened(config.model_dump(mode="json"))
