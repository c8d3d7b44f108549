"""Command lines: as they are shown, and run. Those of a moment are waited for, those of a run outlive the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from qaroma.page.places import LOGS, inside
from qaroma.runs.directory import quoted
from qaroma.runs.files import make_directory, read_json
from qaroma.runs.lock import LOCK, owner_is_gone

LONGEST_ANSWER = 256  # tokens
_TAIL = 4000  # bytes of a log that are shown
_OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # on Windows, where there are no sessions
EXPORTS = {
    "gguf": ("Ollama, LM Studio, llama.cpp", "one file that holds the whole model"),
    "padded": ("vLLM, SGLang", "a small adapter beside the model"),
    "merged": ("Anything else", "the whole model as an ordinary folder"),
}


def of_run(run: Path) -> dict[str, list[str]]:
    """What is typed after ``qaroma`` for the buttons of a run that there is, by their names."""
    folder = run.as_posix()
    return {
        "resume": ["finetune", "--resume", "--output", folder],
        "chat": ["chat", folder, "--max-new-tokens", str(LONGEST_ANSWER)],
        "gguf": ["export", folder, "--format", "gguf", "--outtype", "q8_0"],
        "padded": ["export", folder, "--format", "padded"],
        "merged": ["export", folder, "--format", "merged"],
    }


def shown(words: Sequence[str]) -> str:
    """A command line to copy."""
    return " ".join(["qaroma", *map(quoted, words)])


def argv(words: Sequence[str]) -> list[str]:
    """A command line to run, by this Python."""
    return [sys.executable, "-m", "qaroma", *words]


def answer_of(words: Sequence[str]) -> dict[str, Any]:
    """What a command says with ``--json``; of one that fails its ``error``, in its own words."""
    done = subprocess.run(argv([*words, "--json"]), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        return {"error": own_words(done.stderr.decode("utf-8", "replace"))}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def own_words(said: str) -> str:
    """A command's error, without what libraries wrote before it."""
    _, found, error = f"\n{said}".rpartition("\nerror: ")
    return (error if found else said).strip() or "the command ended without a word"


class Jobs:
    """Commands that outlive the page, each with a log."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._starting = threading.Lock()  # a button is clicked twice

    def start(self, name: str, words: Sequence[str]) -> None:
        """Run a command, unless the one of that name is at work."""
        make_directory(LOGS)
        with self._starting:
            if self.working(name):
                return
            with _log(name).open("wb") as log:
                log.write(f"{shown(words)}\n".encode())
                log.flush()
                self._children[name] = subprocess.Popen(
                    argv(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, creationflags=_OWN_GROUP,
                )  # fmt: skip

    def working(self, name: str) -> bool:
        """Whether this page began it, and it goes on; whether a run is at work is known to its folder."""
        return name in self._children and self._children[name].poll() is None

    def stop(self, run: Path) -> None:
        """Ask a run to stop, whoever began it; it saves its state first."""
        if self.working(run.name):
            self._children[run.name].terminate()
        elif owner_is_gone(run) is False:
            with suppress(psutil.Error, KeyError):
                process = psutil.Process(read_json(run / LOCK)["pid"])
                if any("qaroma" in word for word in process.cmdline()):  # a number is given to others later
                    process.terminate()

    def said(self, name: str) -> str:
        """The command, and the end of what it has said so far."""
        log = _log(name)
        return log.read_bytes()[-_TAIL:].decode("utf-8", "replace").strip() if log.is_file() else ""

    def failure(self, name: str) -> str | None:
        """The error that ended a command, in its own words; None where there is none."""
        said = self.said(name)
        failed = re.search(r"^(error: |Error: |Traceback )", said, re.MULTILINE) and not self.working(name)
        return own_words(said) if failed else None


def _log(name: str) -> Path:
    return inside(LOGS, f"{name}.log")
