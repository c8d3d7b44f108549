"""``metrics.jsonl``: what a run says of itself while it goes on, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError
from qaroma.foreign.json_text import parse_json
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import write_atomically
from qaroma.runs.record_forms import fault_of


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
                found.append(parse_json(line))
            except ValueError:
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
    for number, record in enumerate(records, start=1):
        fault = fault_of(record)
        if fault is not None:
            raise QaromaError(f"line {number} of {run.metrics.name} {fault}")
    return records
