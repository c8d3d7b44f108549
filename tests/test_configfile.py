"""Reading the configuration: layers, and every problem named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qaroma.config.load import config_fields, dump_config, find_config, parse_source, read_settings, shipped_configs
from qaroma.config.schema import Config
from qaroma.errors import QaromaError


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def problems(path: Path | str | None = None, flags: dict[str, Any] | None = None, sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(QaromaError) as caught:
        read_settings(path, flags or {}, sets)
    return str(caught.value)


def test_flags_override_the_file_and_sets_override_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {seed: 1, micro_batch: 2, grad_accum: 3}\nmodel: {name: a}\n")
    flags = {"training.micro_batch": 20, "training.grad_accum": 30, "model.name": None}
    config = read_settings(file, flags, ["training.grad_accum=300"])
    assert (config.training.seed, config.training.micro_batch, config.training.grad_accum) == (1, 20, 300)
    assert config.model.name == "a"


def test_no_file_gives_the_defaults() -> None:
    assert read_settings(None, {}, []) == Config()


@pytest.mark.parametrize("text", ["", "# nothing\n", "growth:\n  # t_in: 3\ndata:\n"])
def test_empty_files_and_sections_mean_the_defaults(tmp_path: Path, text: str) -> None:
    assert read_settings(write(tmp_path, text), {}, []) == Config()


def test_a_byte_order_mark_and_non_ascii_text_are_read(tmp_path: Path) -> None:
    file = tmp_path / "bom.yaml"
    file.write_bytes("\ufeffoutput: läufe/é\n".encode())
    assert read_settings(file, {}, []).output == "läufe/é"


def test_set_reads_yaml_values() -> None:
    config = read_settings(
        None,
        {},
        ["growth.eps_out=1e-3", "growth.target_modules=[q_proj, v_proj]", "growth.max_rank=", "growth={t_in: 7}"],
    )
    growth = config.growth
    assert (growth.eps_out, growth.target_modules, growth.max_rank, growth.t_in) == (
        1e-3, ["q_proj", "v_proj"], None, 7,
    )  # fmt: skip


def test_epochs_typed_over_a_file_with_max_steps_count(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {max_steps: 90}\n")
    config = read_settings(file, {"training.epochs": 2.0}, [])
    assert (config.training.max_steps, config.training.epochs) == (None, 2.0)
    for keys in [("training.epochs", "training.max_steps"), ("training.max_steps", "training.epochs")]:
        both = read_settings(file, dict.fromkeys(keys, 5), [])
        assert (both.training.max_steps, both.training.epochs) == (5, 5.0)
    last = read_settings(file, {"training.max_steps": 5}, ["training.epochs=3"])
    assert (last.training.max_steps, last.training.epochs) == (None, 3.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", ("a.jsonl", 1.0)),
        ("a.jsonl:2", ("a.jsonl", 2.0)),
        ("dir/a b.csv:.5", ("dir/a b.csv", 0.5)),
        ("hub/data:1e-1", ("hub/data", 0.1)),
        ("C:\\x.jsonl", ("C:\\x.jsonl", 1.0)),
        ("C:\\x.jsonl:3", ("C:\\x.jsonl", 3.0)),
        ("C:2", ("C:2", 1.0)),
        ("demo:calendar", ("demo:calendar", 1.0)),
        ("demo:calendar:0.25", ("demo:calendar", 0.25)),
        ("a.jsonl:nan", ("a.jsonl:nan", 1.0)),
    ],
)
def test_data_sources_are_path_or_path_and_weight(text: str, expected: tuple[str, float]) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    "train",
    ["a.jsonl:2", "[a.jsonl:2]", "{path: a.jsonl, weight: 2}", "[{path: a.jsonl, weight: 2.0}]"],
)
def test_training_data_may_be_written_in_four_ways(tmp_path: Path, train: str) -> None:
    sources = read_settings(write(tmp_path, f"data:\n  train: {train}\n"), {}, []).data.train
    assert [(source.path, source.weight) for source in sources] == [("a.jsonl", 2.0)]


def test_data_flags_replace_the_sources_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {train: [a, b]}\n")
    sources = read_settings(file, {"data.train": ["c.csv:2", "d.csv"]}, []).data.train
    assert [(source.path, source.weight) for source in sources] == [("c.csv", 2.0), ("d.csv", 1.0)]


def test_a_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = read_settings(
        None,
        {"data.train": ["C:\\é.jsonl:0.5", "b"], "training.learning_rate": 1e-5, "model.revision": "1e3"},
        ["growth.target_modules=.*_proj", "output='no'", "growth.eps_out=1e-17"],
    )
    file = write(tmp_path, dump_config(config))
    assert read_settings(file, {}, []) == config
    assert set(config_fields()) >= {"model.name", "data.train", "method", "growth.eps_out", "output"}


def test_all_problems_are_reported_at_once_with_their_places(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "modle: {name: x}\ngrowth:\n  eps_ot: 1\n  reset: of\ntraining:\n  micro_batch: 2.5\n  seed: 1\n  seed: 2\n",
    )
    text = problems(file, {"training.grad_accum": 0}, ("eps_out=1", "rank", "training.epochs=[", "model.name.x=1"))
    for line in [
        "10 problems in the configuration:",
        f"{file} line 1: modle: unknown key; did you mean model?",
        f"{file} line 3: growth.eps_ot: unknown key; did you mean growth.eps_out?",
        f"{file} line 4: growth.reset: got 'of'; expected 'prune', 'full' or 'none'",
        f"{file} line 6: training.micro_batch: got 2.5; expected a whole number",
        f"{file} line 8: training.seed: given twice; keep one of the two",
        "--grad-accum: got 0; expected a number above 0",
        "--set eps_out: unknown key; did you mean growth.eps_out?",
        "--set: got 'rank'; expected key=value, as growth.eps_out=1e-3",
        "--set training.epochs: got '['; expected a YAML value",
    ]:
        assert line in text
    assert len(text.splitlines()) == 11


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("growth.eps_out: 1", "growth.eps_out: unknown key; did you mean growth.eps_out?"),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean training.learning_rate?"),
        ("growth: {learning-rate: 1}", "growth.learning-rate: unknown key; did you mean training.learning_rate?"),
        ("data: {train: [{pth: x, path: y}]}", "data.train.0.pth: unknown key; did you mean data.train.0.path?"),
        ("checkpoint: {qqqq: x}", "checkpoint.qqqq: unknown key; known here: every, keep"),
        ("on: 1", "True: unknown key"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in problems(write(tmp_path, line + "\n"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("training: {learning_rate: fast}", "got 'fast'; expected a number"),
        ("training: {learning_rate: 0}", "got 0; expected a number above 0"),
        ("data: {validation_share: 0.9}", "got 0.9; expected a number at most 0.5"),
        ("growth: {dropout: 1}", "got 1; expected a number below 1"),
        ("growth: {target_modules: 3}", "got 3; expected text (in quotes if it looks like a number) or a list"),
        ("model: {revision: 12}", "got 12; expected text (in quotes if it looks like a number)"),
        ("model: {trust_remote_code: maybe}", "got 'maybe'; expected true or false"),
        ("model: phi", "got 'phi'; expected a section: keys with values"),
        ("training: {seed: }", "got nothing; expected a whole number"),
        ("data: {train: [a, 5]}", "data.train.1: got 5; expected a section: keys with values"),
        ("data: {train: ['a.jsonl:-1']}", "data.train.0.weight: got -1.0; expected a number above 0"),
        ("data: {train: [{weight: 2}]}", "data.train.0.path: got nothing"),
    ],
)
def test_a_wrong_value_comes_with_what_was_expected(tmp_path: Path, line: str, expected: str) -> None:
    text = problems(write(tmp_path, line + "\n"))
    assert expected in text
    assert "line 1" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n  b: [1\nc: 2\n", "line 3: not YAML"),
        ("a: b: c\n", "line 1: not YAML"),
        ("a:\n\tb: 1\n", "line 2: not YAML"),
        ("- a\n- b\n", "expected keys with values"),
        ("hello\n", "expected keys with values"),
    ],
)
def test_text_that_is_no_configuration_is_refused_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    assert expected in problems(file)
    assert str(file) in problems(file)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"a: \xff\xfe\n")
    assert "UTF-8" in problems(file)


def test_a_missing_file_names_near_and_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "", "my_run.yaml")
    monkeypatch.chdir(tmp_path)
    assert "did you mean my_run.yaml?" in problems("my_rnu.yaml")
    assert "did you mean quickstart?" in problems("configs/quikstart.yaml")
    assert f"comes with qaroma: {', '.join(shipped_configs())}" in problems("zzz.yaml")
    assert "expected a YAML file" in problems(tmp_path)


@pytest.mark.parametrize("name", ["quickstart", "configs/quickstart.yaml", "configs/quickstart", "quickstart.yaml"])
def test_shipped_configurations_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_settings(name, {}, []).model.name == "smollm2-135m"
    write(tmp_path, "model: {name: local}\n", "quickstart.yaml")
    own = name in ("quickstart", "quickstart.yaml")
    assert (read_settings(name, {}, []).model.name == "local") == own


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_is_valid(name: str) -> None:
    assert find_config(name).is_file()
    config = read_settings(name, {}, [])
    assert config.model.name
    assert config.data.train


def test_something_is_shipped() -> None:
    assert "quickstart" in shipped_configs()
