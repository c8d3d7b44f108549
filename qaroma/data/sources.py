"""Reading rows: from files, folders of files, hub data sets and the built-in demonstration.

A reader knows nothing of what the rows mean (:mod:`qaroma.data.forms` does); it keeps for each the
file and the line, so that everything said about a row later can name its place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qaroma.data.files import Remarks, data_suffix, known_suffix, read_file
from qaroma.data.folders import files_of_folder, is_saved_table
from qaroma.data.unpacked import Room
from qaroma.errors import QaromaError
from qaroma.text.paths import local_path

# A data set of the hub, its configuration and its split, as openai/gsm8k:main@train.
_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<config>[A-Za-z0-9][\w.-]*))?(@(?P<split>\w[\w.:%+\[\]-]*))?"
)
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Row:
    """One record as it was read.

    Attributes:
        value: The record's fields, or the whole text of a .txt file.
        file: The file (or hub id) it came from, as the user named it.
        line: 1-based line of a .jsonl, .csv or .txt file, else the record's 1-based number.
        weight: How often the row appears in an epoch, see :func:`qaroma.data.split.repeated`.
    """

    value: dict[str, Any] | str
    file: str
    line: int
    weight: float = 1.0

    @property
    def place(self) -> str:
        """``file:line``, as messages name the row."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class RowSet:
    """What was read: the rows, the lines that are no rows, and what the user should know.

    Attributes:
        rows: Every row, in the order of the sources.
        bad: ``file:line: what is wrong``, one entry for each line that could not be read.
        notes: Sentences to print, for instance which files of a folder were left out.
        validation: Sources that lie beside the rows and are there to validate on, by their names.
    """

    rows: list[Row]
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)

    def head(self, count: int) -> RowSet:
        """The first ``count`` rows, with all the problems and notes."""
        return replace(self, rows=self.rows[:count])


def read_rows(sources: Sequence[tuple[str, float]], *, seed: int = 0) -> RowSet:
    """Read all rows of one or several sources.

    A source is a .jsonl, .json, .csv, .tsv, .parquet or .txt file (each also with .gz), a folder of them or
    one that ``save_to_disk`` wrote, a hub id (``name:config@split``), or ``demo:calendar`` /
    ``demo:calendar-test``. A .txt file is one row, a document. Lines that cannot be read are collected in
    ``bad``, not raised: :func:`qaroma.data.encode.encode_rows` reports them together with the rows whose
    fields are wrong.

    Args:
        sources: Pairs of (path or id, weight).
        seed: Seed of the generated demonstration rows.

    Returns:
        The rows of all sources in order, each with the weight of its source.

    Raises:
        QaromaError: A source is missing, empty, of an unknown kind, or damaged as a whole.
    """
    found = RowSet([])
    for name, weight in sources:
        before = len(found.rows), len(found.bad)
        for file, line, value in _read_source(name, seed, found):
            found.rows.append(Row(value, file, line, weight))
        if before == (len(found.rows), len(found.bad)):
            raise QaromaError(f"'{name}' holds no rows; expected at least one. Name another file with --data.")
    return found


def require_source(name: str) -> None:
    """Look whether a source is there, without reading it; what the hub has is asked when it is read.

    Args:
        name: path, hub id, or ``demo:...``; ``glue:...`` is :mod:`qaroma.data.glue`'s.

    Raises:
        QaromaError: a file or folder that is missing, or a file of an unknown kind.
    """
    path = local_path(name)
    if name.startswith("demo:"):
        _demo_split(name)
    elif path.is_dir() or name.startswith("glue:"):
        return
    elif path.exists():
        known_suffix(path)
    elif not _may_be_on_hub(name) or data_suffix(path):
        raise QaromaError(f"there is no file or folder '{name}'. {_near(path)}")


def _may_be_on_hub(name: str) -> bool:
    """Whether a name can be a hub id: the hub is not asked for one with a dot and without an owner, a file's."""
    asked = _HUB_ID.fullmatch(name)
    return asked is not None and ("/" in asked["id"] or "." not in asked["id"])


def _read_source(name: str, seed: int, found: RowSet) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
    """Yield (file, line, value) of one source; problems and notes are added to ``found``."""
    require_source(name)
    if name.startswith("demo:"):
        yield from _demo_rows(name, seed)
        return
    path = local_path(name)
    if not path.exists():
        yield from _hub_rows(name, path, found)
        return
    if path.is_dir() and is_saved_table(path):
        yield from _saved_rows(path, found)
        return
    files = [path]
    if path.is_dir():
        listed = files_of_folder(path)
        files = listed.train
        found.validation.extend(map(str, listed.validation))
        found.notes.extend(listed.notes)
    remarks = Remarks(found.bad, found.notes)
    for file in files:
        for line, value in read_file(file, remarks):
            yield str(file), line, value


def _demo_split(name: str) -> tuple[Literal["train", "test"], int]:
    """Which rows of the demonstration a name means, and how many."""
    from qaroma.data import demo

    splits: dict[str, tuple[Literal["train", "test"], int]] = {
        "demo:calendar": ("train", demo.TRAIN_ROWS),
        "demo:calendar-test": ("test", demo.TEST_ROWS),
    }
    if name not in splits:
        raise QaromaError(f"there is no demonstration '{name}'; expected one of {', '.join(splits)}.")
    return splits[name]


def _demo_rows(name: str, seed: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    from qaroma.data import demo

    for line, value in enumerate(demo.rows(*_demo_split(name), seed), start=1):
        yield name, line, dict(value)


def _near(path: Path) -> str:
    """A sentence about a missing path: names like it, or which folder is missing."""
    parent = path.parent
    if not parent.is_dir():
        return f"The folder '{parent}' does not exist either."
    entries = sorted(entry for entry in parent.iterdir() if not entry.name.startswith("."))
    files = [entry.name for entry in entries if data_suffix(entry)]
    names = [*files, *(entry.name for entry in entries if entry.is_dir())]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"'{parent / name}'" for name in close) + "?"
    return f"Data files in '{parent}': {', '.join(files[:5]) or 'none'}."


def _hub_rows(name: str, path: Path, found: RowSet) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows of a hub data set: of the split that is named, else of train."""
    asked = _HUB_ID.fullmatch(name)
    assert asked is not None
    dataset, config, split = asked["id"], asked["config"], asked["split"]
    try:
        import datasets
    except ImportError as error:
        raise QaromaError(f"there is no file '{name}', and a hub id needs datasets; pip install datasets") from error
    try:
        table = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the library raises a dozen kinds, its own and those of its HTTP clients
        lines = (str(error).strip() or type(error).__name__).splitlines()
        unnamed = "onfig name is missing" in lines[0] and len(lines) > 1
        reason = f"{lines[0]} {lines[1]}; type {dataset}:NAME" if unnamed else lines[0]
        raise QaromaError(
            f"there is no file or folder '{name}', and as a hub id it could not be loaded ({reason.rstrip('.')}). "
            f"{_near(path)} Without network, name a local file or folder with --data."
        ) from error
    if split is None:
        whole = name if config else dataset
        table = _training_split(table, found, f"the hub data set '{name}'", lambda other: f"{whole}@{other}")
    for number, value in enumerate(table, start=1):
        yield name, number, dict(value)


def _saved_rows(folder: Path, found: RowSet) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows of a folder that the library datasets saved."""
    try:
        import datasets
    except ImportError as error:
        raise QaromaError(f"'{folder}' was saved by datasets; to read it, type: pip install datasets") from error
    room = Room(folder)
    try:
        table = room.bounded(lambda: datasets.load_from_disk(str(folder)))
    except QaromaError:
        raise
    except Exception as error:  # whatever Arrow and the library raise on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QaromaError(f"'{folder}' was saved by datasets and cannot be read ({reason.rstrip('.')}).") from error
    if isinstance(table, dict):
        table = _training_split(table, found, f"'{folder}'", lambda other: str(folder / other))
    for number, value in enumerate(table, start=1):
        room.take_row(value)
        yield str(folder), number, dict(value)


def _training_split(splits: Any, found: RowSet, what: str, named: Callable[[str], str]) -> Any:
    """The split train; one that is there to validate on is noted, the others are said to be left out."""
    if "train" not in splits:
        ways = " or ".join(named(split) for split in splits)
        raise QaromaError(f"{what} has no train split, only {', '.join(splits)}; name one with --data {ways}.")
    validation = next((split for split in _VALIDATION_SPLITS if split in splits), None)
    if validation is not None:
        found.validation.append(named(validation))
        found.notes.append(f"{what}: the split {validation} is held out to validate on.")
    others = [split for split in splits if split not in ("train", validation)]
    if others:
        found.notes.append(f"{what}: left out {', '.join(others)}; name one with --data {named(others[0])}.")
    return splits["train"]
