"""The eight commonsense tasks of LLM-Adapters: their records, and what counts as an answer.

A record has ``instruction``, ``input``, ``output`` ("the correct answer is X") and ``answer`` ("X"); its
instruction ends with the answers there are ("Answer format: true/false").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qaroma.data.forms import BadRow, Message, to_conversation
from qaroma.data.sources import Row, read_rows
from qaroma.errors import QaromaError

NAME = "commonsense"
MAX_NEW_TOKENS = 32  # of a generated answer, as in LLM-Adapters' commonsense_evaluate.py

# Its patterns: the first match anywhere in the answer is what the model chose.
_NUMBERED = r"answer1|answer2|answer3|answer4|answer5"
PATTERNS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": _NUMBERED,
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
    "ARC-Challenge": _NUMBERED,
    "ARC-Easy": _NUMBERED,
    "openbookqa": _NUMBERED,
}
TASKS = tuple(PATTERNS)

_FILES = ("test.json", "test.json.gz")
_FORMAT = re.compile(r"Answer format:\s*(\S+)")
_FETCH = "git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters/dataset"


@dataclass(frozen=True)
class Question:
    """One record.

    Attributes:
        row: Its number in the task's file, from 0.
        turns: The conversation that training would make of it, the expected answer last.
        answer: The right answer, as "answer2".
        candidates: All answers, the right one among them.
        outputs: What the model would say for each candidate, as "the correct answer is answer2".
    """

    row: int
    turns: tuple[Message, ...]
    answer: str
    candidates: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class TaskSet:
    """The test set of one task.

    Attributes:
        name: One of :data:`TASKS`.
        digest: Names the whole file's records, whether it is compressed or not.
        size: Number of records in the file.
        questions: The first records of the file, or all.
    """

    name: str
    digest: str
    size: int
    questions: tuple[Question, ...]


def chosen_tasks(text: str | None) -> tuple[str, ...]:
    """Task names typed with commas between them; all eight for None.

    Raises:
        QaromaError: An unknown name, or none.
    """
    if text is None:
        return TASKS
    known = {name.lower(): name for name in TASKS}
    typed = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in typed if part.lower() not in known]
    if unknown or not typed:
        raise QaromaError(f"got --tasks '{', '.join(unknown) or text}'; expected some of {','.join(TASKS)}")
    return tuple(dict.fromkeys(known[part.lower()] for part in typed))


def read_tasks(folder: str | Path, tasks: Sequence[str], *, rows: int | None = None) -> list[TaskSet]:
    """Read ``<folder>/<task>/test.json`` (or ``.json.gz``) of each task.

    Args:
        folder: LLM-Adapters' ``dataset`` folder.
        tasks: Some of :data:`TASKS`.
        rows: At most so many questions of each; None is all.

    Raises:
        QaromaError: The folder or a task's file is missing, or a record is not of that kind.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise QaromaError(f"there is no folder '{folder}'; expected LLM-Adapters' test sets. Get them with: {_FETCH}")
    files = {task: _file(root, task) for task in tasks}
    missing = [task for task, file in files.items() if file is None]
    if missing:
        there = [task for task in TASKS if _file(root, task)]
        only = f", or leave them out with --tasks {','.join(there)}" if there else ""
        raise QaromaError(
            f"'{folder}' lacks {', '.join(f'{task}/{_FILES[0]}' for task in missing)} (or .json.gz). "
            f"Get the records with: {_FETCH}{only}"
        )
    return [_read(task, file, rows) for task, file in files.items() if file is not None]


def extract(task: str, text: str) -> str | None:
    """The answer that a generated text gives: the first match of the task's pattern, or None."""
    match = re.search(PATTERNS[task], text.strip())
    return match.group() if match else None


def _file(root: Path, task: str) -> Path | None:
    return next((root / task / name for name in _FILES if (root / task / name).is_file()), None)


def _read(task: str, file: Path, rows: int | None) -> TaskSet:
    found = read_rows([(str(file), 1.0)])
    if found.bad:
        raise QaromaError(f"{found.bad[0]}. Get the records again with: {_FETCH}")
    text = json.dumps([row.value for row in found.rows], sort_keys=True)
    try:
        questions = tuple(_question(task, number, row) for number, row in enumerate(found.rows[:rows]))
    except BadRow as error:
        raise QaromaError(f"{error}; expected a record of LLM-Adapters. Get them with: {_FETCH}") from error
    return TaskSet(task, hashlib.sha256(text.encode()).hexdigest()[:32], len(found.rows), questions)


def _question(task: str, number: int, row: Row) -> Question:
    try:
        turns = to_conversation(row, "alpaca")
    except BadRow as error:
        raise BadRow(f"{row.place}: {error}") from error
    output = turns[-1].content
    answer = row.value.get("answer") if isinstance(row.value, dict) else None
    if not isinstance(answer, str) or not answer or not output.endswith(answer):
        raise BadRow(f"{row.place}: the field 'output' does not end with the field 'answer' ({answer!r})")
    formats = _FORMAT.findall(turns[-2].content)
    candidates = tuple(formats[-1].split("/")) if formats else tuple(PATTERNS[task].split("|"))
    if answer not in candidates:
        raise BadRow(f"{row.place}: the answer {answer!r} is none of {'/'.join(candidates)}")
    lead = output[: -len(answer)]
    return Question(number, tuple(turns), answer, candidates, tuple(lead + candidate for candidate in candidates))
