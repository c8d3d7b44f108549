"""`qaroma export --ollama` with a stand-in for Ollama on the PATH: what it is given, and what its failures become."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from export_adapters import save_random_adapter

from qaroma.cli import main
from qaroma.errors import QaromaError
from qaroma.export import in_ollama
from qaroma.export.in_ollama import check_name, hand_over

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a first line of Unix")
# Writes down what it was given; answers what the file "answer" says, or fails with what "error" says.
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
here = Path(__file__).parent
question = sys.stdin.read()
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([*sys.argv[1:], question]) + "\\n")
if (here / sys.argv[1]).exists():
    sys.exit("\\x1b[?25lgathering model components\\n" + (here / sys.argv[1]).read_text())
if sys.argv[1] == "create":
    assert (Path(sys.argv[4]).parent / "model.gguf").is_file()
print("   \\n" + (here / "answer").read_text() + "\\n")
"""


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in, which is first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ollama").write_text(STAND_IN.format(python=sys.executable))
    (folder / "ollama").chmod(0o755)
    (folder / "answer").write_text("- seven\nand eight")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def live(answer: str, *, whole: bool = True) -> SimpleNamespace:
    return SimpleNamespace(answer=lambda question, tokens: (answer, whole), subject=None)


@pytest.fixture
def export_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(in_ollama, "sample_prompts", lambda subject: ["--how many?", "another"])
    return tmp_path


def test_a_run_becomes_a_model_of_ollamas(
    tiny_folder: Path, tmp_path: Path, ollama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_random_adapter(tiny_folder, tmp_path / "mine")
    out = tmp_path / "an export"
    assert main(["export", str(tmp_path / "mine"), "--ollama", "me/count:v2", "--output", str(out), "--json"]) == 0
    told = capfd.readouterr()
    (one,) = json.loads(told.out)["exports"]
    assert (one["format"], one["outtype"], one["self_test"]["passed"]) == ("gguf", "q4_k_m", True)
    assert one["use"] == f"ollama create me/count:v2 -f '{out.as_posix()}'/Modelfile && ollama run me/count:v2"
    calls = [json.loads(line) for line in (ollama / "calls").read_text().splitlines()]
    question = "What is the capital of France?"  # a general one: the adapter lies outside a run
    assert calls == [
        ["create", "me/count:v2", "-f", f"{out.as_posix()}/Modelfile", ""],
        ["run", "me/count:v2", question],
    ]
    asked = one["ollama"]
    assert (asked["question"], asked["theirs"], asked["same"]) == (question, "- seven\nand eight", False)
    assert f"  this run  {asked['ours'].splitlines()[0]}" in told.err
    assert "  Ollama    - seven\n            and eight\n  the two answers differ" in told.err


def test_answers_are_the_same_up_to_where_ours_was_cut(ollama: Path, export_folder: Path) -> None:
    for answer, whole, same in (
        ("- seven\nand eight", True, True), (" - seven\nand", False, True), ("- seven", True, False),
    ):  # fmt: skip
        assert hand_over(live(answer, whole=whole), export_folder, "m", lambda line: None).same is same
    assert json.loads((ollama / "calls").read_text().splitlines()[1]) == ["run", "m", "--how many?"]


def test_what_ollama_says_of_its_failures_is_a_sentence(ollama: Path, export_folder: Path) -> None:
    (ollama / "create").write_text("Error: could not connect to ollama app, is it running?\n")
    place = export_folder.as_posix()
    with pytest.raises(QaromaError) as failed:
        hand_over(live("x"), export_folder, "m", print)
    assert str(failed.value) == (
        "ollama create: could not connect to ollama app, is it running?; the exported files are whole, go on from them "
        f"with: ollama create m -f {place}/Modelfile"
    )
    (ollama / "create").rename(ollama / "run")
    (ollama / "run").write_text("")
    with pytest.raises(QaromaError, match=r"^ollama run: gathering model components; .* with: ollama run m$"):
        hand_over(live("x"), export_folder, "m", lambda line: None)


def test_where_there_is_no_ollama_the_line_is_enough(export_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(export_folder))
    said: list[str] = []
    assert hand_over(live("x"), export_folder, "m", said.append) is None
    assert said == ["  ollama is not on the PATH: install it from https://ollama.com, and type the line above"]


def test_names_and_formats_are_told_before_anything_is_written(
    tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("", "-f", "two words", "a;b"):
        with pytest.raises(QaromaError, match="for --ollama; expected a model's name, such as calendar"):
            check_name(name)
    save_random_adapter(tiny_folder, tmp_path / "mine")
    assert main(["export", str(tmp_path / "mine"), "--ollama", "m", "--format", "peft"]) == 2
    assert "Ollama takes a whole GGUF model, which is not among the formats" in capfd.readouterr().err
    assert not (tmp_path / "mine" / "export").exists()
