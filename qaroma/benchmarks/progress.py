"""The file of scored questions: appended batch by batch, so that a benchmark goes on where it stopped.

One JSON object a line: first a header that says what was scored and how, before a task's first
question a line that names its records, then a line for each question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError
from qaroma.runs.files import write_atomically
from qaroma.runs.log import MetricsLog

_WORDS = {
    "scorer": "scorer",
    "base": "base model",
    "adapter": "adapter",
    "quantization": "quantisation",
    "template": "template",
    "max_new_tokens": "longest answer",
}


class ScoreFile:
    """Scored questions of one model by one scorer.

    Args:
        path: The file; made where it is missing.
        header: Plain values that say what is scored and how; what an existing file says must be equal.

    Raises:
        QaromaError: The file holds scores of something else, or cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = dict(header)
        self.scored: dict[tuple[str, int], dict[str, Any]] = {}
        self._digests: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read()
        except OSError as error:
            raise QaromaError(f"cannot write to {path} ({error.strerror}); choose another --output") from error

    def begin(self, task: str, digest: str) -> None:
        """Name the records that a task's questions come from.

        Raises:
            QaromaError: The file has scores of other records under that task.
        """
        before = self._digests.get(task)
        if before is None:
            self._append([{"event": "task", "task": task, "digest": digest}])
            self._digests[task] = digest
        elif before != digest:
            raise self._other(f"another test set of {task} (digest {before}, now {digest})")

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of a batch; each has ``task`` and ``row``."""
        self._append(records)
        self.scored.update({(record["task"], record["row"]): dict(record) for record in records})

    def _read(self) -> None:
        lines = MetricsLog(self.path).records()
        if not self.path.exists():
            write_atomically(self.path, json.dumps({"event": "header", **self.header}) + "\n")
            return
        if not lines or not isinstance(lines[0], dict) or lines[0].get("event") != "header":
            raise QaromaError(f"{self.path} is not a file of benchmark scores; choose another --output")
        found = {key: value for key, value in lines[0].items() if key != "event"}
        keys = [key for key in {**found, **self.header} if found.get(key) != self.header.get(key)]
        if keys:
            shown = [f"{_WORDS.get(key, key)} {found.get(key)}, now {self.header.get(key)}" for key in keys]
            raise self._other("; ".join(shown))
        for line in lines[1:]:
            if line.get("event") == "task":
                self._digests[line["task"]] = line["digest"]
            else:
                self.scored[line["task"], line["row"]] = line
        # A kill may have cut the last line short; what is appended must begin a line of its own.
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def _other(self, difference: str) -> QaromaError:
        return QaromaError(
            f"{self.path} holds scores of something else: {difference}. Type --output with another folder, or "
            f"delete {self.path} to score anew"
        )
