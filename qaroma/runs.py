"""A run directory: where its files lie, how they are written, and its metrics log.

::

    runs/<name>/config.yaml       what was run, every value resolved
    runs/<name>/metrics.jsonl     one JSON object a line: steps, growth events, evaluations
    runs/<name>/summary.json      the figures of the whole run, written when it ends
    runs/<name>/checkpoints/      step-00000040/ ...
    runs/<name>/adapter/          the best adapter by validation (the last where there is none)
    runs/<name>/adapter_last/     the last one
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError

# What an adapter folder holds (qaroma.export.peft writes it); named here for those who load no torch.
WEIGHTS, CONFIG, GROWTH = "adapter_model.safetensors", "adapter_config.json", "growth.json"

# How the line of an optimiser step begins, and how much of a log's end holds at least one of them.
_STEP, _TAIL = re.compile(rb'\{"step": (\d+), "loss": '), 1 << 20


class RunDirectory:
    """Paths of one run.

    Args:
        path: the directory; :meth:`create` makes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.adapter_last = self.path / "adapter_last"

    @property
    def resume_command(self) -> str:
        """What to type to go on with it."""
        return f"qaroma finetune --resume --output {quoted(self.path.as_posix())}"

    def exists(self) -> bool:
        return self.config.is_file()

    def last_step(self) -> int:
        """The last optimiser step of its log, read from the end of the file; 0 where there is none."""
        if not self.metrics.is_file():
            return 0
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.metrics.stat().st_size - _TAIL))
            found = _STEP.findall(file.read())
        return int(found[-1]) if found else 0

    def finished(self, last: int) -> bool:
        """Whether the run ended, and was not resumed to go further.

        Args:
            last: the last optimiser step of its log.
        """
        summary = read_json(self.summary)
        # Runs of older versions have no summary: one is over when its last adapter is of its last step.
        end = summary.get("steps", last) if summary else read_json(self.adapter_last / GROWTH).get("step")
        return end is not None and int(end) >= last

    def create(self, config_yaml: str) -> None:
        """Make the directory and write its configuration.

        Raises:
            QaromaError: there is a run already, or something else stands in the way.
        """
        if self.exists():
            raise QaromaError(
                f"{self.path} already holds a run; type --resume to go on with it, or choose another --output"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config_yaml)
        except OSError as error:
            raise QaromaError(f"cannot write to {self.path} ({error.strerror}); choose another --output") from error

    @classmethod
    def unused(cls, name: str) -> RunDirectory:
        """``runs/<name>``, or ``runs/<name>-2`` and so on where that is taken."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        number, run = 1, cls(Path("runs") / slug)
        while run.path.exists():
            number += 1
            run = cls(Path("runs") / f"{slug}-{number}")
        return run


class MetricsLog:
    """``metrics.jsonl``, one object a line, flushed line by line.

    Args:
        path: the file; lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a kill cut short is left out."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def cut_back(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run writes it again."""
        kept = [r for r in self.records() if r.get("step", 0) <= step]
        write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in kept))


def read_records(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics log of a run that may be damaged.

    Raises:
        QaromaError: it cannot be read, or holds something else.
    """
    try:
        records: list[Any] = MetricsLog(run.metrics).records()
    except (OSError, UnicodeDecodeError) as error:
        raise QaromaError(f"{run.metrics.name} cannot be read") from error
    if not all(isinstance(record, dict) for record in records):
        raise QaromaError(f"{run.metrics.name} holds lines that are no records")
    return records


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or, just now, half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def quoted(text: str) -> str:
    """``text`` as one word of this system's shell; plain double quotes where they are safe everywhere."""
    if re.fullmatch(r"[\w./:@+-]+", text):
        return text
    if not re.search(r'["$`\\!%]', text):
        return f'"{text}"'
    return '"' + text.replace('"', '\\"') + '"' if os.name == "nt" else shlex.quote(text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file aside, flush it to the disk, and put it in place in one move."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def directory_written_aside(target: Path) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    Yields an empty directory beside ``target``; when the block ends, its files are flushed and it
    takes the target's place. When the block raises, it is removed and the target is as it was.
    """
    aside = target.with_name(target.name + ".part")
    replaced = target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if replaced.exists() and not target.exists():  # a kill between the two moves below
        replaced.rename(target)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            flush(file)
        flush(aside)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        aside.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync a file, or a directory where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
