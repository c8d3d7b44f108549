"""Worker processes that carry out what is wanted, until nothing is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qaroma.compare.suite.cells import Cell

_ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
Wanted = Callable[[], Sequence[Cell]]
Tell = Callable[[str], None]


class Pool:
    """Hands out cells, each to one worker at a time.

    Args:
        data: folder of the beds' files.
        folder: of the results; ``workers.log`` in it holds what workers print.
        wanted: the cells that are not done, most urgent first; asked again after every cell.
        tell: where a line about each cell goes.
    """

    def __init__(self, data: Path, folder: Path, wanted: Wanted, tell: Tell) -> None:
        self.data, self.folder, self.wanted, self.tell = data, folder, wanted, tell
        self.failed: dict[Cell, str] = {}
        self._running: set[Cell] = set()
        self._change = threading.Condition()
        self._stopped = False
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, jobs: int) -> dict[Cell, str]:
        """Work until nothing is wanted.

        Args:
            jobs: workers side by side, one thread each.

        Returns:
            The cells that failed, with the reason.

        Raises:
            KeyboardInterrupt: stopped by the user; what is written stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(jobs)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(timeout=0.5)
        finally:
            self._stop()
        return self.failed

    def _stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
        for process in self._processes:
            process.kill()
            process.wait()

    def _work(self) -> None:
        process: subprocess.Popen[str] | None = None
        while (cell := self._take()) is not None:
            start = time.perf_counter()
            if process is None or process.poll() is not None:
                process = self._begin()
            problem = _ask(process, cell)
            with self._change:
                self._running.discard(cell)
                if problem:
                    self.failed[cell] = problem
                if not self._stopped:
                    self.tell(f"{cell.file()}: {problem or 'done'} ({time.perf_counter() - start:.0f} s)")
                self._change.notify_all()
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()

    def _take(self) -> Cell | None:
        """The next cell; waits while others may lead to new ones, None at the end."""
        with self._change:
            while not self._stopped:
                free = [c for c in self.wanted() if c not in self._running and c not in self.failed]
                if free:
                    self._running.add(free[0])
                    return free[0]
                if not self._running:
                    return None
                self._change.wait()
        return None

    def _begin(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "qaroma.compare.suite.worker", str(self.data), str(self.folder)]
        with (self.folder / "workers.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                env={**os.environ, **_ALONE},
            )  # fmt: skip
        self._processes.append(process)
        return process


def _ask(process: subprocess.Popen[str], cell: Cell) -> str:
    """What went wrong with a cell; empty where it is written."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(cell.to_json()) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = ""
    return answer.strip() if answer else "the worker ended; see workers.log"
