"""A GGUF export as a model in Ollama: created there, and asked what the live model is asked."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError
from qaroma.export.live import LiveModel, sample_prompts

_TOKENS = 128  # of the live model's answer
_ANSWER_SECONDS = 600  # the model is loaded within them too
_NAME = re.compile(r"\w[\w.:/-]*", re.ASCII)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Asked:
    """One question as two answer it.

    Attributes:
        model: what Ollama calls its one.
        question: what both were asked.
        ours, theirs: the live model's answer, and Ollama's.
        same: whether Ollama's is the live model's, up to where that one was cut.
    """

    model: str
    question: str
    ours: str
    theirs: str
    same: bool

    def lines(self) -> list[str]:
        """For people: one answer under the other."""
        indented = [text.replace("\n", "\n" + " " * 12) for text in (self.question, self.ours, self.theirs)]
        told = "the two answers are the same" if self.same else "the two answers differ"
        return [f"  asked     {indented[0]}", f"  this run  {indented[1]}", f"  Ollama    {indented[2]}", f"  {told}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_name(name: str) -> None:
    """Refuse what cannot be a model's name in Ollama, before anything is written.

    Raises:
        QaromaError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise QaromaError(f"got '{name}' for --ollama; expected a model's name, such as calendar or me/calendar:v2")


def hand_over(tuned: LiveModel, folder: Path, name: str, say: Callable[[str], None]) -> Asked | None:
    """Create a model in Ollama from a finished GGUF export, and ask it a question beside the live model.

    Args:
        tuned: the live model.
        folder: of the export, with its Modelfile.
        name: what Ollama shall call it.
        say: takes a line for people.

    Returns:
        The question and both answers; None where there is no Ollama.

    Raises:
        QaromaError: Ollama failed; the export stays as it is.
    """
    if shutil.which("ollama") is None:
        say("  ollama is not on the PATH: install it from https://ollama.com, and type the line above")
        return None
    _run(["create", name, "-f", (folder / "Modelfile").as_posix()])
    say(f"  {name} is in Ollama")
    question = sample_prompts(tuned.subject)[0]
    ours, whole = tuned.answer(question, _TOKENS)
    theirs = _run(["run", name], question, seconds=_ANSWER_SECONDS)
    same = theirs == ours.strip() if whole else theirs.startswith(ours.strip())
    asked = Asked(name, question, ours, theirs, same)
    for line in asked.lines():
        say(line)
    return asked


def _run(arguments: Sequence[str], text: str = "", *, seconds: float | None = None) -> str:
    """Run Ollama's command; what it writes, or its last word of an error as a sentence.

    A question goes by the standard input, where it may begin with a dash.
    """
    command = [shutil.which("ollama") or "ollama", *arguments]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"no answer in {seconds:.0f} seconds" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    else:
        if done.returncode == 0:
            return done.stdout.strip()
        told = [_COLOUR.sub("", line).strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
        reason = next((line for line in reversed(told) if line), f"exit code {done.returncode}")
    raise QaromaError(
        f"ollama {arguments[0]}: {reason.removeprefix('Error: ')}; the exported files are whole, go on from them with: "
        f"{shlex.join(['ollama', *arguments])}"
    )
