"""Every example in every help and in README: typed in their order, each finds what it names, and comes to its work."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from test_cli import COMMANDS
from test_pages import README, typed_lines
from test_run_table import write_run

from qaroma.cli import main

# Where the work of a command is; all before that is done in earnest: arguments, files, runs, settings.
WORK = ("training.finetune", "training.forecast", "training.launch", "inference.open", "inference.chat",
        "export.exporter", "export.push", "report.write", "plan.report", "plan.configure", "bench.bench", "bench.sheet",
        "benchmarks.harness", "compare.compare", "compare.suite.suite", "doctor.machine", "data.encode",
        "page.server")  # fmt: skip
# What readers have of their own.
FILES = {
    "mine.jsonl": '{"text": "a"}\n',
    "theirs.jsonl": '{"text": "a"}\n',
    "test.jsonl": '{"text": "a"}\n',
    "prompts.txt": "a\n",
    "mrpc.yaml": "model: {name: smollm2-135m}\ndata: {train: mine.jsonl}\n",
    "axolotl.yaml": "base_model: smollm2-135m\ndatasets: [{path: theirs.jsonl}]\n",
    "DATA/text.txt": "a\n",
    "LLM-Adapters/dataset/boolq/test.json": "[]",
}


class AtWorkError(BaseException):
    """A command has begun its work."""


def stand_in(name: str) -> types.ModuleType:
    """A module whose every function says that the work has begun; a fine-tuning leaves its run, init its file."""

    def work(*arguments: Any, **_: Any) -> Any:
        settings = arguments[0] if arguments else None
        if name == "training.finetune" and settings.output is not None:
            write_run(Path(settings.output), model={"name": settings.model.name})
        if name == "plan.configure":
            Path("mine.yaml").write_text(FILES["mrpc.yaml"], encoding="utf-8")
        raise AtWorkError(name)

    module = types.ModuleType(f"qaroma.{name}")
    module.__dict__["__getattr__"] = lambda _: work
    return module


def examples(command: click.Command) -> list[str]:
    """The commands under ``Examples:``, whole; those that are continued on the next line too."""
    text = (command.epilog or "").rpartition("Examples:\n")[2].replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type an example as a shell would, as far as its work."""
    piped, _, last = line.rpartition(" | ")
    line, _, file = last.partition(" < ")
    text = Path(file).read_text(encoding="utf-8") if file else shlex.split(piped)[-1] if piped else ""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    words = [str(one) for word in shlex.split(line) for one in (sorted(Path().glob(word)) if "*" in word else [word])]
    assert words[0] == "qaroma"
    with contextlib.suppress(AtWorkError):
        assert main(words[1:]) == 0, line


@pytest.fixture
def fresh_imports() -> Iterator[None]:
    """What is imported beside stand-ins is forgotten with them."""
    before = set(sys.modules)
    yield
    for name in [name for name in sys.modules if name.startswith("qaroma.") and name not in before]:
        del sys.modules[name]
        package, _, module = name.rpartition(".")
        if package in sys.modules:  # a later import would find the old one there
            vars(sys.modules[package]).pop(module, None)


@pytest.fixture
def stage(fresh_imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the readers' files, and commands that go as far as their work."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    for name in WORK:
        monkeypatch.setitem(sys.modules, f"qaroma.{name}", stand_in(name))


@pytest.mark.usefixtures("stage")
def test_every_example_can_be_typed_and_finds_what_it_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [(), ("finetune",), ("init",)]  # these make what the others name
    last = [("runs",), ("runs", "rm")]  # and these remove it
    rest = [path for path in COMMANDS if path not in (*first, *last)]
    seen: list[str] = []
    for path in (*first, *rest, *last):
        for line in examples(COMMANDS[path]):
            if line in seen or line == "qaroma init":  # in two helps; asks, where there is somebody to ask
                continue
            for run in ("runs/demo", "runs/mine"):  # what one example has removed is there for the next
                if not Path(run).exists() and " rm " in line:
                    write_run(Path(run))
            seen.append(line)
            typed(line if " rm " not in line or "--yes" in line else f"{line} --yes", monkeypatch)
    assert len(seen) > 40
    capsys.readouterr()


def test_a_help_names_no_run_that_the_helps_do_not_make() -> None:
    lines = [line for command in COMMANDS.values() for line in examples(command)]
    made = {words[words.index("--output") + 1] for line in lines if "--output" in (words := shlex.split(line))}
    named = {word for line in lines for word in shlex.split(line) if word.startswith("runs/") and "*" not in word}
    assert {"runs/demo", "runs/mine"} <= named <= {*made, "runs/demo"}  # which qaroma demo makes


@pytest.mark.usefixtures("stage")
def test_the_commands_of_readme_can_be_typed_in_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.rpartition(" && ")[2] for line in typed_lines(README)]
    assert lines[0] == "qaroma demo"
    for line in lines[:-1]:
        typed(line, monkeypatch)
    assert lines[-1].startswith("pytest")
    capsys.readouterr()
