"""The conversation of the page: ``qaroma chat --json`` as a child that ends with the page."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

from qaroma.page.commands import argv, of_run, own_words
from qaroma.page.places import LOGS
from qaroma.runs.files import make_directory

_LOG = LOGS / "chat.log"  # what the command writes beside its answers


class Talk:
    """One model at a time in memory: of the run that was talked to last."""

    def __init__(self) -> None:
        self._run: Path | None = None
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def answer(self, run: Path, message: str) -> AsyncIterator[str]:
        """The tuned model's answer to a message, then the base's.

        Args:
            run: whose model is loaded, where it is not.
            message: empty begins anew.

        Yields:
            Lines of JSON, as the help of ``qaroma chat`` has them.
        """
        async with self._turn:
            if self._process is None or self._run != run or self._process.returncode is not None:
                self.end()
                make_directory(LOGS)
                with _LOG.open("wb") as log:
                    command = argv([*of_run(run)["chat"], "--json"])
                    self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=log)
                self._run = run
            process, ended = self._process, False
            asked = {"message": message, "base": True} if message else {"reset": True}
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(f"{json.dumps(asked)}\n".encode())
                while line := (await process.stdout.readline()).decode("utf-8", "replace"):
                    ended = "done" in json.loads(line)
                    yield line
                    if ended:
                        return
                said = _LOG.read_text(encoding="utf-8", errors="replace")
                yield json.dumps({"error": own_words(said)}) + "\n"
            finally:
                if not ended:  # whoever asked has gone: the rest of the answer would be taken for the next one's
                    self.end()

    def end(self) -> None:
        """Let go of the model."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
