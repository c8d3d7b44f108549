"""Every kind of file gives the same rows, with the lines they stand on; what is wrong is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qaroma.data import unpacked
from qaroma.data.folders import role_of
from qaroma.data.sources import read_rows
from qaroma.errors import QaromaError

RECORDS = [
    {"instruction": "Add 1 and 2.", "output": "3"},
    {"instruction": 'Two\nlines, "quoted"; and \u2028 more', "output": "naïve 日本"},
    {"instruction": "Last", "output": "row"},
]


def _content(suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode("utf-8")
    if suffix == ".json":
        return json.dumps(RECORDS, indent=1).encode("utf-8")
    if suffix == ".csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(RECORDS)
        return stream.getvalue().encode("utf-8")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stream_bytes = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), stream_bytes)
    return stream_bytes.getvalue()


def _write(path: Path, content: bytes | str) -> str:
    raw = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, gz: str) -> None:
    name = _write(tmp_path / f"rows{suffix}{gz}", _content(suffix))
    found = read_rows([(name, 1.5)])
    assert [row.value for row in found.rows] == RECORDS
    assert found.bad == []
    assert {row.file for row in found.rows} == {name}
    assert {row.weight for row in found.rows} == {1.5}
    # The second CSV record spans lines 3 and 4, below the header.
    assert [row.line for row in found.rows] == ([2, 3, 5] if suffix == ".csv" else [1, 2, 3])


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_a_text_file_is_one_document(tmp_path: Path, gz: str) -> None:
    name = _write(tmp_path / f"book.txt{gz}", "\ufeffOne.\r\n\r\nTwo.\n")
    assert [(row.value, row.line) for row in read_rows([(name, 1.0)]).rows] == [("One.\n\nTwo.\n", 1)]


def test_json_variants(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    variants = {
        "lines.json": lines,
        "array.jsonl": json.dumps(RECORDS, indent=2),
        "bom.jsonl": "\ufeff" + lines + "\n\n",
        "inside.json": json.dumps({"version": 1, "data": RECORDS}),
        "crlf.jsonl": lines.replace("\n", "\r\n"),
    }
    for name, content in variants.items():
        found = read_rows([(_write(tmp_path / name, content), 1.0)])
        assert [row.value for row in found.rows] == RECORDS, name
        assert not found.bad, name


def test_csv_with_semicolons_and_wrong_widths(tmp_path: Path) -> None:
    name = _write(tmp_path / "a.csv", "prompt;completion\na, b;c\n\nonly one\nx;y;z\nd;e\n")
    found = read_rows([(name, 1.0)])
    assert [row.value for row in found.rows] == [
        {"prompt": "a, b", "completion": "c"},
        {"prompt": "d", "completion": "e"},
    ]
    assert [row.line for row in found.rows] == [2, 6]
    assert found.bad == [
        f"{name}:4: got 1 columns; expected 2 as in the header",
        f"{name}:5: got 3 columns; expected 2 as in the header",
    ]


def test_bad_lines_are_collected_with_their_places(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n{"text": \n\n[1]\n{"text": "\xff"}\n{"text": "b"}\n'
    name = _write(tmp_path / "a.jsonl", content)
    found = read_rows([(name, 1.0)])
    assert [row.line for row in found.rows] == [1, 6]
    assert [entry.split(": ")[0] for entry in found.bad] == [f"{name}:2", f"{name}:4", f"{name}:5"]
    assert "not valid JSON" in found.bad[0]
    assert "expected an object" in found.bad[1]
    assert "not UTF-8" in found.bad[2]


@pytest.mark.parametrize("content", [b'text\n"one\ntwo"\n', b'text\n"one\ntwo"', b'text\r\n"one\r\ntwo"\r\n\r\n'])
def test_a_quoted_field_of_csv_holds_lines(tmp_path: Path, content: bytes) -> None:
    found = read_rows([(_write(tmp_path / "a.csv", content), 1.0)])
    assert [row.value["text"].split() for row in found.rows] == [["one", "two"]]
    assert found.bad == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "not valid JSON: .* at line 2, column 10"),
        ("a.json", b'{"one": [{"a": 1}], "two": [{"a": 1}]}', "several lists \\(one, two\\)"),
        ("a.json", b"3", "expected a list of objects"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.txt", b"caf\xe9", "not UTF-8 text \\(byte 3 is 0xe9\\)"),
        ("a.parquet", b"PAR1 but no more", "not a whole parquet file"),
        (
            "a.csv",
            b'text\none\n"two\nthree\n',
            "row of line 3 is not closed, and takes in the rest of the file \\(2 lines\\)",
        ),
        ("a.csv", b'text\n"one\n', "row of line 2 is not closed, and takes in the rest of the file \\(1 lines\\)"),
        (
            "a.xlsx",
            b"x",
            "no known suffix; expected .*; end the name of any other text in .txt",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(QaromaError, match=message):
        read_rows([(_write(tmp_path / name, content), 1.0)])


def bomb(path: Path) -> None:
    """A small file that comes to 100 MB."""
    import pyarrow
    from pyarrow import parquet

    letters = b'{"text": "' + b"a" * (1 << 20) + b'"}'
    if path.suffix == ".gz":
        ends = {".jsonl": (b"", b"\n"), ".json": (b"[", b",")}.get(path.with_suffix("").suffix, (b"", b""))
        with gzip.open(path, "wb") as file:
            file.write(ends[0])
            for _ in range(100):
                file.write(letters + ends[1])
    elif path.stem == "one":  # a text stands once for all rows
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["a" * 100_000])
        parquet.write_table(pyarrow.table({"text": column}), path)
    elif path.stem == "nothing":
        parquet.write_table(pyarrow.table({"text": pyarrow.nulls(1_000_000, pyarrow.string())}), path)
    else:
        parquet.write_table(
            pyarrow.table({"text": ["a" * (1 << 20)] * 100}), path, compression="zstd", use_dictionary=False
        )


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz", "a.csv.gz", "a.parquet", "one.parquet", "nothing.parquet"]
)
def test_compressed_data_comes_to_a_hundred_times_its_size_at_most(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "_ALWAYS", 1 << 24)
    bomb(tmp_path / name)
    with pytest.raises(QaromaError, match=r"comes to more than \d+ MiB when it is unpacked, .* is not compressed"):
        read_rows([(str(tmp_path / name), 1.0)])


def test_a_library_that_takes_too_much_memory_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "_ALWAYS", 0)
    monkeypatch.setattr(unpacked, "_BUFFERS", 0)
    bomb(tmp_path / "a.parquet")
    # Memory is looked at from time to time: what that misses on a busy machine is counted when it is there.
    with pytest.raises(QaromaError, match=r"cannot be unpacked \(it takes more than \d+ MiB|comes to more than 0 MiB"):
        read_rows([(str(tmp_path / "a.parquet"), 1.0)])


def test_many_objects_over_several_lines_and_many_keys_are_read_soon(tmp_path: Path) -> None:
    began = time.process_time()
    pretty = "\n".join(json.dumps({"text": "a" * 300}, indent=2) for _ in range(20_000))
    (tmp_path / "a.jsonl").write_text(pretty)
    assert len(read_rows([(str(tmp_path / "a.jsonl"), 1.0)]).rows) == 20_000
    keys = ",".join(f'"{n}":0' for n in range(50_000))
    (tmp_path / "b.jsonl").write_text("{" + keys + ',"49999":0}\n')
    assert "'49999' stands twice" in read_rows([(str(tmp_path / "b.jsonl"), 1.0)]).bad[0]
    assert time.process_time() - began < 5


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "abc"}\n' * 100)
    for name, content in {"cut": whole[:-12], "other": b"plain text", "noise": whole[:20] + b"\x00" * 30}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(QaromaError, match="not a whole gzip file"):
            read_rows([(str(path), 1.0)])


def test_folder_reads_all_its_data_files(tmp_path: Path) -> None:
    _write(tmp_path / "b" / "two.jsonl", '{"text": "2"}')
    _write(tmp_path / "a.json.gz", '[{"text": "1"}]')
    _write(tmp_path / ".cache" / "x.jsonl", '{"text": "hidden"}')
    _write(tmp_path / "notes.md", "no data")
    found = read_rows([(str(tmp_path), 1.0)])
    assert [row.value for row in found.rows] == [{"text": "1"}, {"text": "2"}]
    assert found.notes == []


def test_folder_with_splits_gives_the_training_files_and_says_so(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "dev.json", "testimony.jsonl"):
        _write(tmp_path / name, json.dumps({"text": name}))
    found = read_rows([(str(tmp_path), 1.0)])
    assert [row.value["text"] for row in found.rows] == ["testimony.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert "test.jsonl left out" in found.notes[0]
    assert "dev.json held out to validate on" in found.notes[1]
    assert found.validation == [str(tmp_path / "dev.json")]


def test_missing_paths_name_near_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(QaromaError, match=r"Did you mean '.*train\.jsonl'\?"):
        read_rows([(str(tmp_path / "trian.jsonl"), 1.0)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked for a file"))
    for name in ("train.jsn", "train.json5", "train.xlsx", "my.train"):
        with pytest.raises(QaromaError, match=f"there is no file or folder '{name}'. "):
            read_rows([(name, 1.0)])
    with pytest.raises(QaromaError, match=r"folder '.*nowhere' does not exist"):
        read_rows([(str(tmp_path / "nowhere" / "a.jsonl"), 1.0)])
    with pytest.raises(QaromaError, match=r"Data files in .*: train\.jsonl"):
        read_rows([(str(tmp_path / "zzzzzzzz.csv"), 1.0)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(QaromaError, match="holds no data file"):
        read_rows([(str(tmp_path / "empty"), 1.0)])


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str | None) -> dict[str, list[dict[str, str]]]:
        asked.append(name)
        if name == "me/offline":
            raise ConnectionError("Couldn't reach the hub\nwith a long trace")
        return {"train": RECORDS} if name == "me/data" else {"validation": RECORDS}

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_rows([("me/data", 2.0)])
    assert [row.value for row in found.rows] == RECORDS
    assert found.rows[1].place == "me/data:2"
    with pytest.raises(QaromaError, match=r"as a hub id it could not be loaded \(Couldn't reach the hub\)"):
        read_rows([("me/offline", 1.0)])
    with pytest.raises(QaromaError, match="no train split, only validation"):
        read_rows([("me/held-out", 1.0)])
    assert asked == ["me/data", "me/offline", "me/held-out"]
    with pytest.raises(QaromaError, match="no file or folder"):
        read_rows([("me/data.jsonl", 1.0)])
    assert len(asked) == 3, "a path with a data suffix is never asked of the hub"


def test_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    demo = SimpleNamespace(
        TRAIN_ROWS=3,
        TEST_ROWS=2,
        rows=lambda split, count, seed: [{"instruction": split, "output": str(seed + i)} for i in range(count)],
    )
    monkeypatch.setitem(sys.modules, "qaroma.data.demo", demo)
    monkeypatch.setattr("qaroma.data.demo", demo, raising=False)
    assert [row.value["output"] for row in read_rows([("demo:calendar", 1.0)], seed=7).rows] == ["7", "8", "9"]
    assert [row.value["instruction"] for row in read_rows([("demo:calendar-test", 1.0)]).rows] == ["test"] * 2
    with pytest.raises(QaromaError, match=r"no demonstration 'demo:x'; expected one of demo:calendar"):
        read_rows([("demo:x", 1.0)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pretty.jsonl", "\n\n".join(json.dumps(record, indent=2) for record in RECORDS)),
        ("pretty.json", "\n".join(json.dumps(record, indent=2) for record in RECORDS)),
        ("joined.jsonl", "".join(json.dumps(record) for record in RECORDS)),
        ("columns.json", json.dumps({key: [record[key] for record in RECORDS] for key in RECORDS[0]})),
        (
            "pandas.json",
            json.dumps({key: {str(n): record[key] for n, record in enumerate(RECORDS)} for key in RECORDS[0]}),
        ),
        ("splits.json", json.dumps({"train": RECORDS, "test": [{"instruction": "held", "output": "out"}]})),
    ],
)
def test_records_in_other_shapes(tmp_path: Path, name: str, content: str) -> None:
    found = read_rows([(_write(tmp_path / name, content), 1.0)])
    assert [row.value for row in found.rows] == RECORDS
    assert not found.bad
    assert len(found.notes) == (name == "splits.json")
    if name == "pretty.jsonl":
        assert [row.line for row in found.rows] == [1, 6, 11]


def test_one_broken_first_line_does_not_hide_the_others(tmp_path: Path) -> None:
    name = _write(tmp_path / "a.jsonl", '{"text": \n{"text": "b"}\n{"text": "a", "text": "b"}\n' + "[" * 9000 + "\n")
    found = read_rows([(name, 1.0)])
    assert [row.line for row in found.rows] == [2]
    assert [entry.split(": ")[0] for entry in found.bad] == [f"{name}:1", f"{name}:3", f"{name}:4"]
    assert "'text' stands twice" in found.bad[1]


def test_tables_written_by_hand(tmp_path: Path) -> None:
    for name, content in {"a.csv": "prompt, completion\na, b\n", "a.tsv": "prompt\tcompletion\na\tb\n"}.items():
        found = read_rows([(_write(tmp_path / name, content), 1.0)])
        assert [row.value for row in found.rows] == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(QaromaError, match="UTF-16 text; save it as UTF-8"):
        read_rows([(_write(tmp_path / "a.jsonl", '{"text": "a"}'.encode("utf-16")), 1.0)])


@pytest.mark.parametrize(
    ("file", "role"),
    [
        ("train.jsonl", "train"),
        ("dolly_train.jsonl", "train"),
        ("train/0000.parquet", "train"),
        ("part-1.jsonl", "train"),
        ("testimony.jsonl", "train"),
        ("latest.jsonl", "train"),
        ("evaluate_me.jsonl", "train"),
        ("test/train-0.jsonl", "train"),
        ("test.jsonl", "test"),
        ("dolly_test.jsonl", "test"),
        ("dolly-test-00000-of-00001.parquet", "test"),
        ("test/0000.jsonl", "test"),
        ("data/test/part-3.jsonl", "test"),
        ("heldout.jsonl", "test"),
        ("my_held_out.jsonl", "test"),
        ("Hold-Out.csv", "test"),
        ("valid.jsonl", "validation"),
        ("dev.json.gz", "validation"),
        ("validation-00000-of-00002.parquet", "validation"),
        ("eval/a.jsonl", "validation"),
    ],
)
def test_the_role_of_a_file_is_in_its_name(file: str, role: str) -> None:
    assert role_of(Path(file)) == role


def test_a_folder_of_held_out_files_alone_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "test.jsonl", '{"text": "t"}')
    _write(tmp_path / "dataset_info.json", '{"mine": {"file_name": "test.jsonl", "columns": {"prompt": "q"}}}')
    found = read_rows([(str(tmp_path), 1.0)])
    assert [row.value for row in found.rows] == [{"text": "t"}]
    assert (found.validation, len(found.notes)) == ([], 1)
    assert "dataset_info.json is not read" in found.notes[0]


def test_what_the_library_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "validation": table, "extra": table}).save_to_disk(str(tmp_path / "all"))
    assert [row.value for row in read_rows([(str(tmp_path / "one"), 1.0)]).rows] == RECORDS
    found = read_rows([(str(tmp_path / "all"), 1.0)])
    assert [row.value for row in found.rows] == RECORDS
    assert found.validation == [str(tmp_path / "all" / "validation")]
    assert "left out extra" in found.notes[1]
    assert len(read_rows([(found.validation[0], 1.0)]).rows) == 3


def test_configuration_and_split_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str | None, str | None]] = []

    def load(name: str, config: str | None, split: str | None) -> object:
        asked.append((name, config, split))
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']\nExample")
        return RECORDS if split else {"train": RECORDS, "validation": RECORDS, "test": RECORDS}

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_rows([("me/data:main", 1.0)])
    assert found.validation == ["me/data:main@validation"]
    assert "left out test; name one with --data me/data:main@test" in found.notes[1]
    assert len(read_rows([("me/data:main@train[:10%]", 1.0)]).rows) == 3
    assert asked == [("me/data", "main", None), ("me/data", "main", "train[:10%]")]
    with pytest.raises(QaromaError, match=r"available configs: \['main'\]; type me/data:NAME"):
        read_rows([("me/data", 1.0)])
