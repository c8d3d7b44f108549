"""The conversation of the page: ``qaroma chat --json`` as a child that ends with the page."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

from qaroma.page.commands import argv, own_words
from qaroma.runs.files import make_directory

LONGEST_ANSWER = 256  # tokens


def chat_words(run: Path) -> list[str]:
    return ["chat", run.as_posix(), "--max-new-tokens", str(LONGEST_ANSWER)]


class Talk:
    """One model at a time in memory: of the run that was talked to last.

    Args:
        log: what the command writes beside its answers.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._run: Path | None = None
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def begin(self, run: Path) -> AsyncIterator[str]:
        """Load a run's model, or forget what was said where it is loaded.

        Yields:
            Lines of JSON, as the help of ``qaroma chat`` has them.
        """
        async with self._turn:
            if self._run == run and self._process is not None and self._process.returncode is None:
                async for line in self._lines({"reset": True}):
                    yield line
                return
            self.end()
            make_directory(self._log.parent)
            command = argv([*chat_words(run), "--json"])
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=log)
            self._run = run
            async for line in self._lines(None, last="ready"):
                yield line

    async def say(self, message: str) -> AsyncIterator[str]:
        """The answers to a message: the tuned model's, then the base's."""
        async with self._turn:
            async for line in self._lines({"message": message, "base": True}):
                yield line

    def end(self) -> None:
        """Let go of the model."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()

    async def _lines(self, asked: dict[str, object] | None, last: str = "done") -> AsyncIterator[str]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            yield json.dumps({"error": "the model is not loaded; load this page again"}) + "\n"
            return
        ended = False
        try:
            if asked is not None:
                process.stdin.write((json.dumps(asked) + "\n").encode())
            while line := (await process.stdout.readline()).decode("utf-8", "replace"):
                yield line
                if last in json.loads(line):
                    ended = True
                    return
            yield json.dumps({"error": own_words(self._log.read_text(encoding="utf-8", errors="replace"))}) + "\n"
        finally:
            if not ended:  # whoever asked has gone: the rest of the answer would be taken for the next one's
                self.end()
