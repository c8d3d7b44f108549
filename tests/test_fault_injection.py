"""A run whose every call to the file system fails once, or is its last: what it saved opens, and it goes on.

All cases are forked from one process that has everything imported and has trained nothing itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_calls import NEED_NO_ROOM, CrashStates, Interposer, copy, failing
from rich.console import Console
from test_training import make_config, records

from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.runs.adapter import read_adapter
from qaroma.runs.checkpoint import load_newest
from qaroma.runs.directory import RunDirectory
from qaroma.training.finetune import finetune

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
STEPS = 12
QUIET = Console(quiet=True)


def forked(work: Callable[[], Any], out: Path) -> Any:
    """What ``work`` returns in a process of its own, or the traceback that it ended with."""
    child = os.fork()
    if child == 0:
        try:
            found = work()
        except BaseException:
            found = traceback.format_exc()
        out.write_bytes(pickle.dumps(found))
        os._exit(0)
    os.waitpid(child, 0)
    return pickle.loads(out.read_bytes())


class Cases:
    """One configuration, the bytes that it ends with, and what its calls leave behind."""

    def __init__(self, model: Path, rows: Path, folder: Path) -> None:
        self.folder, self.place = folder, folder / "place"
        self.run = self.place / "run"
        self.place.mkdir()
        self.config = make_config(
            model, rows, self.run,
            growth__t_in=4, growth__eps_out=0.05, training__max_steps=STEPS, training__evaluate_every=2,
            training__micro_batch=2, training__grad_accum=1, training__memory="0",
            checkpoint__every=3, checkpoint__keep=2,
        )  # fmt: skip
        self.states = folder / "states"
        self.calls, self.whole = forked(self._recorded, folder / "out")

    def _recorded(self) -> tuple[list[tuple[int, str, str]], dict[str, str]]:
        states = CrashStates(self.place, self.states)
        with Interposer(self.place, after=states.after):
            finetune(self.config, console=QUIET)
        assert "commit" in [g["decision"] for g in records(self.run, "growth")]
        assert {"exchange", "link", "rmdir"} <= {name for _, name, _ in states.calls}
        return states.calls, self.fingerprints()

    def fingerprints(self) -> dict[str, str]:
        files = [*self.run.glob("adapter/*"), *self.run.glob("adapter_last/*")]
        return {str(f.relative_to(self.run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    def crashed(self, state: Path) -> str:
        """How a run goes on from a state that a crash left."""
        copy(state, self.place)
        return str(forked(lambda: self._goes_on(), self.folder / "out"))

    def failed(self, at: int, number: int) -> str:
        """How a run ends whose call ``at`` fails, and then goes on."""
        copy(self.folder / "empty", self.place)

        def work() -> str:
            try:
                with Interposer(self.place, before=failing(at, number)):
                    finetune(self.config, console=QUIET)
                first = "ended"
            except QaromaError:
                first = "a sentence"
            return f"{first}, then {self._goes_on()}"

        return str(forked(work, self.folder / "out"))

    def _goes_on(self) -> str:
        run = RunDirectory(self.run)
        if run.adapter.exists():
            read_adapter(run.adapter)
        if run.exists():
            named = sorted(p.name for p in run.checkpoints.glob("step-????????"))
            base = json.loads((run.checkpoints / named[-1] / "state.json").read_text())["base"] if named else ""
            loaded, warnings = load_newest(run.checkpoints, fingerprint=base)
            assert not warnings
            assert (loaded is None) == (not named)
            finetune(Config.model_validate({"output": str(self.run)}), resume=True, console=QUIET)
        else:
            finetune(self.config, console=QUIET)
        assert self.fingerprints() == self.whole
        assert [s["step"] for s in records(self.run)] == list(range(1, STEPS + 1))
        assert not [p.name for p in run.path.rglob("*") if ".part-" in p.name or ".old-" in p.name]
        return "same bytes"


@pytest.fixture(scope="module")
def cases(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "empty").mkdir()
    rows = folder / "rows.jsonl"
    few = [{"instruction": f"count {n}", "output": f"it is {n % 5}"} for n in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in few), encoding="utf-8")
    return Cases(tiny_folder, rows, folder)


def told(cases: dict[str, str]) -> str:
    """Outcomes and their counts, for the report."""
    return "; ".join(f"{count} x {outcome}" for outcome, count in Counter(cases.values()).most_common())


def require_good(found: dict[str, str]) -> None:
    bad = {case: outcome for case, outcome in found.items() if not outcome.endswith("same bytes")}
    assert not bad, "\n\n".join(f"{case}: {outcome}" for case, outcome in bad.items())


def every(cases: Cases) -> list[tuple[str, Callable[[], str]]]:
    """All cases: every state that a kill or a power cut leaves, and every call that fails."""
    found: list[tuple[str, Callable[[], str]]] = []
    for state in sorted(cases.states.iterdir()):
        found.append((state.name, lambda state=state: cases.crashed(state)))  # type: ignore[misc]
    for at, name, path in cases.calls:
        for number in (errno.EIO,) if name in NEED_NO_ROOM else (errno.EIO, errno.ENOSPC):
            title = f"{at:05d}-{errno.errorcode[number]} {name} {os.path.relpath(path, cases.place)}"
            found.append((title, lambda at=at, number=number: cases.failed(at, number)))  # type: ignore[misc]
    return found


def test_a_sample_of_the_faults(cases: Cases) -> None:
    found, start = {}, time.monotonic()
    for title, case in random.Random(5).sample(every(cases), 200):
        found[title] = case()
        if time.monotonic() - start > 10:
            break
    require_good(found)


@pytest.mark.slow
def test_every_fault(cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    all_cases = every(cases)
    found = {title: case() for title, case in all_cases}
    with capsys.disabled():
        print(f"\n{len(cases.calls)} calls, {len(all_cases)} cases: {told(found)}")
    require_good(found)
