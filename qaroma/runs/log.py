"""``metrics.jsonl``: what a run says of itself while it goes on, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import flush, write_atomically
from qaroma.runs.record_forms import fault_of
from qaroma.text.json_text import parse_json


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

    def write_new(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write those that are not there yet: a run that was killed right after them has written them before."""
        kinds = {record.get("event") for record in records}
        known = [record for record in self.records() if record.get("event") in kinds] if records else []
        for record in records:
            if record not in known:
                self.write(record)

    def flush(self) -> None:
        """See to it that what is written outlasts a power cut."""
        if self.path.is_file():
            flush(self.path)
            flush(self.path.parent)

    def records(self) -> list[dict[str, Any]]:
        """All whole lines; one that a kill cut short, or that was damaged since, is left out."""
        return [record for _, record in self._lines() if record is not None]

    def damaged(self) -> list[int]:
        """Numbers of the lines that cannot be read, but for a last one that a kill cut short."""
        lines = self._lines()
        whole = lines[:-1] if lines and not self.path.read_bytes().endswith(b"\n") else lines
        return [number for number, (_, record) in enumerate(whole, 1) if record is None]

    def cut_back(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run writes it again. Damaged lines before that stay."""
        lines = self._lines()
        kept = [n for n, (_, record) in enumerate(lines) if record is not None and _step(record) <= step]
        last = max(kept, default=-1)
        stays = {*kept, *(n for n, (_, record) in enumerate(lines[:last]) if record is None)}
        text = "".join(line + "\n" for n, (line, _) in enumerate(lines) if n in stays)
        write_atomically(self.path, text)

    def _lines(self) -> list[tuple[str, dict[str, Any] | None]]:
        """Each line, and the object that it holds."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")
        return [(line.decode("utf-8", errors="replace"), _record(line)) for line in lines if line.strip()]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _step(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


def read_records(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics log of a run that may be damaged: all its lines that can be read.

    Raises:
        QaromaError: it cannot be read, or holds something else.
    """
    log = MetricsLog(run.metrics)
    try:
        records, damaged = log.records(), log.damaged()
    except OSError as error:
        raise QaromaError(f"{run.metrics.name} cannot be read") from error
    if damaged and not records:
        raise QaromaError(f"{run.metrics.name} holds lines that are no records")
    for number, record in enumerate(records, start=1):
        fault = fault_of(record)
        if fault is not None:
            raise QaromaError(f"line {number} of {run.metrics.name} {fault}")
    return records
