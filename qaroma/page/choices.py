"""What a person chooses on the way to a run, and the commands that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from qaroma.data.files import Remarks, read_file
from qaroma.data.forms import recognise
from qaroma.data.sources import Row
from qaroma.errors import QaromaError
from qaroma.model.builtin import SMOLLM2_NAME
from qaroma.page.places import UPLOADS, inside

DEMO = "demo:calendar"
_LOOKED_AT = 200  # rows
MEANINGS = {
    "prompt": "The question",
    "completion": "The answer",
    "system": "Standing instructions, if any",
    "text": "Or, without questions: the text",
}
FORMS = {
    "alpaca": "instructions with their answers",
    "completion": "questions with their answers",
    "messages": "conversations",
    "sharegpt": "conversations",
    "preference": "questions with a better and a worse answer",
    "text": "plain text",
}


@dataclass(frozen=True)
class Choice:
    """Data, what its columns mean, and a model.

    Attributes:
        data: name of the uploaded file, or of the built-in example.
        form: of its rows, one of :data:`FORMS`; None where none was recognised.
        names: of the columns that its rows have then.
        columns: what is which of them: as chosen, or else the first two.
        model: as ``--model`` takes it.
        skip: whether rows that cannot be read are left out.
    """

    data: str
    form: str | None
    names: tuple[str, ...]
    columns: Mapping[str, str]
    model: str
    skip: bool = False

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Choice:
        """From an address or a form.

        Raises:
            QaromaError: no such data.
        """
        data = query.get("data", "")
        form, names = ("alpaca", ()) if data == DEMO else _look(inside(UPLOADS, data))
        columns = {meaning: query[meaning] for meaning in MEANINGS if query.get(meaning)}
        if not columns and len(names) > 1:
            columns = dict(zip(("prompt", "completion"), names, strict=False))
        model = query.get("other", "").strip() or query.get("model", "").strip() or SMOLLM2_NAME
        return cls(data, form, names, columns, model, bool(query.get("skip")))

    @property
    def fields(self) -> dict[str, str]:
        """What :meth:`read` takes."""
        return {"data": self.data, **self.columns, "model": self.model, **({"skip": "1"} if self.skip else {})}

    @property
    def skipping(self) -> Choice:
        """The same without the rows that cannot be read."""
        return replace(self, skip=True)

    def preview(self) -> list[str]:
        return ["data", "preview", *self._words(), "--examples", "3"]

    def finetune(self, run: Path) -> list[str]:
        return ["finetune", *self._words(), "--output", run.as_posix()]

    def _words(self) -> list[str]:
        source = DEMO if self.data == DEMO else (UPLOADS / self.data).as_posix()
        columns = ",".join(f"{meaning}={name}" for meaning, name in self.columns.items())
        task = ["--task", "preference"] if self.form == "preference" else []
        skip = ["--skip-bad-rows"] if self.skip else []
        return ["--model", self.model, "--data", source, *(["--columns", columns] if columns else []), *task, *skip]


def _look(file: Path) -> tuple[str | None, tuple[str, ...]]:
    """The form of the first rows; where it is not known, the names of their columns."""
    if not file.is_file():
        raise QaromaError(f"there is no file {file.name} in {UPLOADS.as_posix()}; choose it again")
    rows: list[Row] = []
    try:
        read = islice(read_file(file, Remarks([], [])), _LOOKED_AT)
        rows.extend(Row(value, file.as_posix(), line) for line, value in read)
        if rows:
            return recognise(rows), ()
    except QaromaError:  # the preview will say what is wrong
        pass
    return None, tuple(dict.fromkeys(str(name) for row in rows if isinstance(row.value, dict) for name in row.value))
