"""The eight commonsense tasks of LLM-Adapters: their records as the tasks in ``tasks/*.yaml`` read them.

A record has ``instruction``, ``input``, ``output`` ("the correct answer is X") and ``answer`` ("X"); its
instruction ends with the answers there are ("Answer format: true/false").
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from qaroma.data.forms import BadRow, to_conversation
from qaroma.data.sources import Row, read_rows
from qaroma.errors import QaromaError
from qaroma.text.paths import local_path

_FILES = ("test.json", "test.json.gz")
_FORMAT = re.compile(r"Answer format:\s*(\S+)")
_FETCH = "git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters/dataset"


def read(task: str, data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test set of one task, for the harness.

    Args:
        task: the folder of the task's records, as ``ARC-Easy``.
        data: LLM-Adapters' ``dataset`` folder; it holds ``<task>/test.json`` or ``.json.gz``.

    Returns:
        ``test``: for each record its ``question``, the possible answers as ``choices`` ("answer2"), the right
        one as ``answer`` and as number ``gold``, and what the model would say for each of them as ``outputs``.

    Raises:
        QaromaError: the folder or the task's file is missing, or a record is not of that kind.
    """
    found = read_rows([(str(_file(task, data)), 1.0)])
    if found.bad:
        raise QaromaError(f"{found.bad[0]}. Get the records again with: {_FETCH}")
    try:
        return {"test": Dataset.from_list([_document(row) for row in found.rows])}
    except BadRow as error:
        raise QaromaError(f"{error}; expected a record of LLM-Adapters. Get them with: {_FETCH}") from error


def _file(task: str, data: str | None) -> Path:
    if data is None:
        raise QaromaError(f"the commonsense tasks need LLM-Adapters' test sets; get them with: {_FETCH}")
    root = local_path(data)
    if not root.is_dir():
        raise QaromaError(f"there is no folder '{data}'; expected LLM-Adapters' test sets. Get them with: {_FETCH}")
    for name in _FILES:
        if (root / task / name).is_file():
            return root / task / name
    there = sorted(path.name for path in root.iterdir() if any((path / name).is_file() for name in _FILES))
    only = f"; it holds {', '.join(there)}, which --tasks can name alone" if there else ""
    raise QaromaError(f"'{data}' lacks {task}/{_FILES[0]} (or .json.gz){only}. Get the records with: {_FETCH}")


def _document(row: Row) -> dict[str, Any]:
    try:
        question, reply = to_conversation(row, "alpaca")[-2:]
    except BadRow as error:
        raise BadRow(f"{row.place}: {error}") from error
    output = reply.content
    answer = row.value.get("answer") if isinstance(row.value, dict) else None
    if not isinstance(answer, str) or not answer or not output.endswith(answer):
        raise BadRow(f"{row.place}: the field 'output' does not end with the field 'answer' ({answer!r})")
    formats = _FORMAT.findall(question.content)
    choices = formats[-1].split("/") if formats else []
    if answer not in choices:
        raise BadRow(f"{row.place}: the answer {answer!r} is none of {'/'.join(choices) or 'an Answer format'}")
    lead = output[: -len(answer)]
    return {
        "question": question.content,
        "choices": choices,
        "answer": answer,
        "gold": choices.index(answer),
        "outputs": [lead + choice for choice in choices],
    }
