"""Reading the files that data comes in: records with the line they stand on, and what is wrong with the others."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from qaroma.data.unpacked import Room, Unpacked
from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
EXPECTED = (
    f"expected {', '.join(SUFFIXES)} (also .gz); end the name of any other text in .txt, and save a spreadsheet as CSV"
)

_LARGEST_CSV_FIELD = 1 << 30
_ROWS_AT_ONCE, _ROWS_IN_PYTHON = 10_000, 16
_NOT_BLANK = re.compile(r"\S")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Record: TypeAlias = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Remarks:
    """What reading had to say.

    Attributes:
        bad: ``file:line: what is wrong``, one entry for each line that could not be read.
        notes: sentences to print.
    """

    bad: list[str]
    notes: list[str]


_Reader: TypeAlias = Callable[[IO[bytes], str, Remarks], Iterator[tuple[int, Any]]]


class _TwiceError(ValueError):
    """An object that has a key twice, of which JSON readers keep the last without a word."""


def data_suffix(path: Path) -> str:
    """The data suffix of a file name below .gz, or the empty string."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def known_suffix(path: Path) -> str:
    """The data suffix of a file.

    Raises:
        QaromaError: none that is read here.
    """
    suffix = data_suffix(path)
    if not suffix:
        raise QaromaError(f"'{path}' has no known suffix; {EXPECTED}.")
    return suffix


def read_file(path: Path, remarks: Remarks) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line, value) of one file, compressed or not.

    Args:
        path: the file.
        remarks: takes up what is to be said.

    Raises:
        QaromaError: a file that is damaged as a whole, not UTF-8, or of an unknown kind.
    """
    readers: dict[str, _Reader] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".txt": _txt,
    }
    suffix = known_suffix(path)
    try:
        with path.open("rb") as raw:
            packed = path.name.lower().endswith(".gz")
            stream = io.BufferedReader(Unpacked(gzip.GzipFile(fileobj=raw), path)) if packed else raw
            yield from readers[suffix](stream, str(path), remarks)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise QaromaError(f"'{path}' is not a whole gzip file ({error}); fetch or compress it again.") from error
    except UnicodeDecodeError as error:
        raise QaromaError(
            f"'{path}' is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8 and try again."
        ) from error
    except OSError as error:
        raise QaromaError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _jsonl(stream: IO[bytes], file: str, remarks: Remarks) -> Iterator[Record]:
    # Bytes are split at b"\n" only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    first, start = b"", 0
    for start, first in enumerate(stream, start=1):
        if start == 1 and first.startswith(_UTF16):
            raise QaromaError(f"'{file}' is UTF-16 text; save it as UTF-8 and try again.")
        first = first.removeprefix(b"\xef\xbb\xbf") if start == 1 else first
        if first.strip():
            break
    if first.lstrip().startswith(b"["):
        yield from _json(io.BytesIO(first + stream.read()), file, remarks)
        return
    lines: Iterator[bytes] = iter(stream)
    if not _is_json(first):
        rest = stream.read()
        spread = _spread(first + rest, start)
        if spread:
            yield from spread
            return
        lines = iter(io.BytesIO(rest))
    for number, raw in enumerate(itertools.chain([first], lines), start=start):
        if not raw.strip():
            continue
        try:
            value = _loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            remarks.bad.append(f"{file}:{number}: not UTF-8 text")
        except (ValueError, RecursionError) as error:
            remarks.bad.append(f"{file}:{number}: {_wrong(error)}")
        else:
            yield from _objects([value], file, remarks, start=number)


def _spread(raw: bytes, start: int) -> list[Record]:
    """Records that stand over several lines each, or several on a line; empty where the text is not that."""
    records = []
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    try:
        text = raw.decode("utf-8")
        position, line = 0, start
        while (found := _NOT_BLANK.search(text, position)) is not None:
            line += text.count("\n", position, found.start())
            value, position = decoder.raw_decode(text, found.start())
            if not isinstance(value, dict):
                return []
            records.append((line, value))
            line += text.count("\n", found.start(), position)
    except (ValueError, RecursionError):
        return []
    return records


def _json(stream: IO[bytes], file: str, remarks: Remarks) -> Iterator[Record]:
    raw = stream.read()
    text = raw.decode("utf-8-sig")
    try:
        value = _loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(io.BytesIO(raw), file, remarks)  # JSON Lines under the name .json are common
            return
        place = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        said = error.msg if isinstance(error, json.JSONDecodeError) else _wrong(error)
        raise QaromaError(f"'{file}' is not valid JSON: {said}{place}; mend it there.") from error
    yield from _objects(_records(value, file, remarks), file, remarks)


def _records(value: Any, file: str, remarks: Remarks) -> list[Any]:
    """The list of records in a JSON document: itself, its columns, its list of objects, or one record."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise QaromaError(f"'{file}' holds a JSON {type(value).__name__}; expected a list of objects.")
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if any("role" in value[key][0] or "from" in value[key][0] for key in lists):
        return [value]  # one conversation
    if "train" in lists:
        others = [key for key in lists if key != "train"]
        if others:
            remarks.notes.append(f"{file}: {', '.join(others)} left out, since it has a list 'train'")
        return list(value["train"])
    if len(lists) > 1:
        raise QaromaError(f"'{file}' holds several lists ({', '.join(lists)}); expected one list of objects.")
    return list(value[lists[0]]) if lists else _rows_of_columns(value) or [value]


def _rows_of_columns(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Records from one list, or one object of numbered values, for each key; empty where the object is not that."""
    values = [list(column.values()) if isinstance(column, dict) else column for column in columns.values()]
    if len(values) < 2 or not all(isinstance(column, list) and len(column) == len(values[0]) for column in values):
        return []
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _objects(values: Sequence[Any], file: str, remarks: Remarks, *, start: int = 1) -> Iterator[Record]:
    """Number the records and set aside those that are not objects."""
    for number, value in enumerate(values, start=start):
        if isinstance(value, dict):
            yield number, value
        else:
            remarks.bad.append(f"{file}:{number}: got a JSON {type(value).__name__}; expected an object")


def _loads(text: str) -> Any:
    return parse_json(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _TwiceError(f"the key {name!r} stands twice in an object")
    return found


def _is_json(line: bytes) -> bool:
    try:
        _loads(line.decode("utf-8"))
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass  # what is wrong with it is said where it is read
    return True


def _wrong(error: Exception) -> str:
    """What is wrong with a JSON text."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return (
        str(error) if isinstance(error, _TwiceError) else "not JSON that can be read (too deep, or a number too long)"
    )


def _csv(stream: IO[bytes], file: str, remarks: Remarks) -> Iterator[Record]:
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    header = text.readline()
    if not header.strip():
        return
    # Spreadsheets write semicolons where the comma is the decimal point.
    delimiter = max(",;\t", key=header.count)
    spaced = f"{delimiter} " in header  # written by hand: the space belongs to the comma
    columns = next(csv.reader([header], delimiter=delimiter, skipinitialspace=spaced))
    ended = False

    def rest() -> Iterator[str]:
        nonlocal ended
        yield from text
        ended = True

    reader = csv.reader(rest(), delimiter=delimiter, skipinitialspace=spaced)
    last_line = 0
    while True:
        line = last_line + 2  # the header is line 1, and a quoted field may hold line breaks
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remarks.bad.append(f"{file}:{line}: not valid CSV ({error})")
            last_line = reader.line_num
            continue
        if ended:  # more was asked for within a record: the quoted field took in all that follows
            raise QaromaError(
                f"'{file}': a quote in the row of line {line} is not closed, and takes in the rest of the file "
                f'({reader.line_num - last_line:,} lines); close it, or write "" where it belongs to the text.'
            )
        last_line = reader.line_num
        if len(cells) == len(columns):
            yield line, dict(zip(columns, cells, strict=True))
        elif cells:
            remarks.bad.append(f"{file}:{line}: got {len(cells)} columns; expected {len(columns)} as in the header")


def _parquet(stream: IO[bytes], file: str, remarks: Remarks) -> Iterator[Record]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise QaromaError(f"reading '{file}' needs pyarrow; type: pip install pyarrow") from error
    room, number = Room(Path(file)), 0
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if file.endswith(".gz") else stream)
        batches = table.iter_batches(batch_size=_ROWS_AT_ONCE)
        while (batch := room.bounded(lambda: next(batches, None))) is not None:
            for start in range(0, batch.num_rows, _ROWS_IN_PYTHON):  # few: a dictionary holds a text for all of them
                for value in batch.slice(start, _ROWS_IN_PYTHON).to_pylist():
                    room.take_row(value)
                    number += 1
                    yield number, value
    except pyarrow.ArrowException as error:
        raise QaromaError(f"'{file}' is not a whole parquet file ({str(error).splitlines()[0]}).") from error


def _txt(stream: IO[bytes], file: str, remarks: Remarks) -> Iterator[tuple[int, str]]:
    text = stream.read().decode("utf-8-sig").replace("\r\n", "\n")
    if text.strip():
        yield 1, text
