"""Reading rows: from files, folders of files, hub data sets and the built-in demonstration.

A reader knows nothing of what the rows mean (:mod:`qaroma.data.forms` does); it keeps for each the
file and the line, so that everything said about a row later can name its place.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast

from qaroma.errors import QaromaError
from qaroma.foreign.json_text import parse_json
from qaroma.foreign.paths import local_path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TRAIN_FILE = re.compile(r"train", re.IGNORECASE)
_HELD_OUT_FILE = re.compile(r"(test|dev|val|valid|validation|eval)\b", re.IGNORECASE)
_LARGEST_CSV_FIELD = 1 << 30

_Reader: TypeAlias = Callable[[IO[bytes], str, list[str]], Iterator[tuple[int, Any]]]


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
    """

    rows: list[Row]
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def head(self, count: int) -> RowSet:
        """The first ``count`` rows, with all the problems and notes."""
        return replace(self, rows=self.rows[:count])


def read_rows(sources: Sequence[tuple[str, float]], *, seed: int = 0) -> RowSet:
    """Read all rows of one or several sources.

    A source is a .jsonl, .json, .csv, .parquet or .txt file (each also with .gz), a folder of them,
    a hub id, or ``demo:calendar`` / ``demo:calendar-test``. A .txt file is one row, a document. Lines
    that cannot be read are collected in ``bad``, not raised: :func:`qaroma.data.encode.encode_rows`
    reports them together with the rows whose fields are wrong.

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
        _known_suffix(path)
    elif not _HUB_ID.fullmatch(name) or _data_suffix(path):
        raise QaromaError(f"there is no file or folder '{name}'. {_near(path)}")


def _read_source(name: str, seed: int, found: RowSet) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
    """Yield (file, line, value) of one source; problems and notes are added to ``found``."""
    require_source(name)
    if name.startswith("demo:"):
        yield from _demo_rows(name, seed)
        return
    path = local_path(name)
    if not path.exists():
        yield from _hub_rows(name, path)
        return
    for file in _files_of_folder(path, found) if path.is_dir() else [path]:
        for line, value in _read_file(file, found.bad):
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


def _files_of_folder(folder: Path, found: RowSet) -> list[Path]:
    """The data files below a folder; files of a test split stay out where there is a training split."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and _data_suffix(file) and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )
    if not files:
        raise QaromaError(f"the folder '{folder}' holds no data file; expected {', '.join(SUFFIXES)} (also .gz).")
    held_out = [file for file in files if _HELD_OUT_FILE.match(file.name)]
    if held_out and any(_TRAIN_FILE.match(file.name) for file in files):
        files = [file for file in files if file not in held_out]
        names = ", ".join(str(file.relative_to(folder)) for file in held_out)
        found.notes.append(f"{folder}: {names} left out, since the folder has training files; name a file to use it.")
    return files


def _data_suffix(path: Path) -> str:
    """The data suffix of a file name below .gz, or the empty string."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _known_suffix(path: Path) -> str:
    """The data suffix of a file.

    Raises:
        QaromaError: none that is read here.
    """
    suffix = _data_suffix(path)
    if not suffix:
        raise QaromaError(f"'{path}' has no known suffix; expected one of {', '.join(SUFFIXES)} (also .gz).")
    return suffix


def _near(path: Path) -> str:
    """A sentence about a missing path: names like it, or which folder is missing."""
    parent = path.parent
    if not parent.is_dir():
        return f"The folder '{parent}' does not exist either."
    entries = sorted(entry for entry in parent.iterdir() if not entry.name.startswith("."))
    files = [entry.name for entry in entries if _data_suffix(entry)]
    names = [*files, *(entry.name for entry in entries if entry.is_dir())]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"'{parent / name}'" for name in close) + "?"
    return f"Data files in '{parent}': {', '.join(files[:5]) or 'none'}."


def _read_file(path: Path, bad: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line, value) of one file, compressed or not."""
    readers: dict[str, _Reader] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
    suffix = _known_suffix(path)
    try:
        with path.open("rb") as raw:
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.name.lower().endswith(".gz") else raw
            yield from readers[suffix](stream, str(path), bad)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise QaromaError(f"'{path}' is not a whole gzip file ({error}); fetch or compress it again.") from error
    except UnicodeDecodeError as error:
        raise QaromaError(
            f"'{path}' is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8 and try again."
        ) from error
    except OSError as error:
        raise QaromaError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _jsonl(stream: IO[bytes], file: str, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Bytes are split at b"\n" only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, raw in enumerate(stream, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.lstrip().startswith(b"["):
                yield from _json(io.BytesIO(raw + stream.read()), file, bad)
                return
        if not raw.strip():
            continue
        try:
            value = parse_json(raw.decode("utf-8"))
        except json.JSONDecodeError as error:
            bad.append(f"{file}:{number}: not valid JSON ({error.msg} at column {error.colno})")
        except UnicodeDecodeError:
            bad.append(f"{file}:{number}: not UTF-8 text")
        except ValueError as error:
            bad.append(f"{file}:{number}: not valid JSON ({error})")
        else:
            yield from _objects([value], file, bad, start=number)


def _json(stream: IO[bytes], file: str, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    raw = stream.read()
    text = raw.decode("utf-8-sig")
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(io.BytesIO(raw), file, bad)  # JSON Lines under the name .json are common
            return
        raise QaromaError(
            f"'{file}' is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; mend it there."
        ) from error
    except ValueError as error:
        raise QaromaError(f"'{file}' is not valid JSON: {error}; mend it there.") from error
    yield from _objects(_records(value, file), file, bad)


def _records(value: Any, file: str) -> list[Any]:
    """The list of records in a JSON document: itself, its only list of objects, or one record."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise QaromaError(f"'{file}' holds a JSON {type(value).__name__}; expected a list of objects.")
    if "messages" in value or "conversations" in value:
        return [value]
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) > 1:
        raise QaromaError(f"'{file}' holds several lists ({', '.join(lists)}); expected one list of objects.")
    only: list[Any] = value[lists[0]] if lists else [value]
    return only


def _objects(
    values: Sequence[Any], file: str, bad: list[str], *, start: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number the records and set aside those that are not objects."""
    for number, value in enumerate(values, start=start):
        if isinstance(value, dict):
            yield number, value
        else:
            bad.append(f"{file}:{number}: got a JSON {type(value).__name__}; expected an object")


def _csv(stream: IO[bytes], file: str, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    header = text.readline()
    if not header.strip():
        return
    # Spreadsheets write semicolons where the comma is the decimal point.
    delimiter = max(",;\t", key=header.count)
    columns = next(csv.reader([header], delimiter=delimiter))
    reader = csv.reader(text, delimiter=delimiter)
    last_line = 0
    while True:
        line = last_line + 2  # the header is line 1, and a quoted field may hold line breaks
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.append(f"{file}:{line}: not valid CSV ({error})")
            last_line = reader.line_num
            continue
        last_line = reader.line_num
        if len(cells) == len(columns):
            yield line, dict(zip(columns, cells, strict=True))
        elif cells:
            bad.append(f"{file}:{line}: got {len(cells)} columns; expected {len(columns)} as in the header")


def _parquet(stream: IO[bytes], file: str, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise QaromaError(f"reading '{file}' needs pyarrow; type: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if file.endswith(".gz") else stream)
        number = 0
        for batch in table.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield number, value
    except pyarrow.ArrowException as error:
        raise QaromaError(f"'{file}' is not a whole parquet file ({str(error).splitlines()[0]}).") from error


def _txt(stream: IO[bytes], file: str, bad: list[str]) -> Iterator[tuple[int, str]]:
    text = stream.read().decode("utf-8-sig").replace("\r\n", "\n")
    if text.strip():
        yield 1, text


def _hub_rows(name: str, path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows of the train split of a hub data set."""
    try:
        import datasets
    except ImportError as error:
        raise QaromaError(f"there is no file '{name}', and a hub id needs datasets; pip install datasets") from error
    try:
        table = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds, its own and those of its HTTP clients
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QaromaError(
            f"there is no file or folder '{name}', and as a hub id it could not be loaded ({reason.rstrip('.')}). "
            f"{_near(path)} Without network, name a local file or folder with --data."
        ) from error
    if "train" not in table:
        raise QaromaError(
            f"the hub data set '{name}' has no train split, only {', '.join(table)}; save the split you want as "
            ".jsonl and name that file with --data."
        )
    for number, value in enumerate(table["train"], start=1):
        yield name, number, dict(value)
