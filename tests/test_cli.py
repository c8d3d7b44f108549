"""The command line: instant help without torch, arguments passed on, errors in one sentence."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from qaroma import __version__
from qaroma.cli import COMMANDS as DECLARED
from qaroma.cli import SECTIONS, main, root
from qaroma.cli.output import write_figures
from qaroma.config.load import config_fields
from qaroma.config.schema import Config
from qaroma.errors import QaromaError

ROOT = Path(__file__).resolve().parent.parent
HELP_SECONDS, HELP_IMPORTS = 0.5, 8  # of computing, or on a slow machine so many times what click alone takes


def computing() -> float:
    """Seconds that ended child processes have computed, whatever else the machine does; Windows counts none."""
    times = os.times()
    return time.perf_counter() if os.name == "nt" else times.children_user + times.children_system


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group with what is typed to reach it."""
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(root))


def typed(*arguments: str, folder: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a shell sees of ``qaroma ARGUMENTS``."""
    return subprocess.run(
        [sys.executable, "-m", "qaroma", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, encoding="utf-8",
        timeout=60, check=False, **options,
    )  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the commands name: data, and a run with an adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "v.jsonl", "C:\\b.jsonl"):
        Path(name).touch()
    adapter = Path("runs/x/adapter")
    adapter.mkdir(parents=True)
    (adapter / "growth.json").touch()
    Path("runs/x/config.yaml").write_text("model: {name: m}\ndata: {train: a.jsonl}\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def called(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts recorders in the place of the functions that do the work; holds the last call's arguments."""
    record: dict[str, Any] = {}

    def recorder(name: str, result: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            record.update(function=name, positional=positional, **named)
            print("chatter of a library")
            return result(record)

        return call

    run = types.ModuleType("qaroma.training.finetune")
    run.__dict__["finetune"] = recorder("finetune", lambda _: {"steps": 3, "loss": float("nan")})
    inference = types.ModuleType("qaroma.inference.open")
    inference.__dict__["generate_from_run"] = recorder(
        "generate", lambda call: [f"<{p}>" for p in call["positional"][1]]
    )
    inference.__dict__["evaluate_run"] = recorder("evaluate", lambda _: {"loss": 1.5, "perplexity": float("inf")})
    monkeypatch.setitem(sys.modules, "qaroma.training.finetune", run)
    monkeypatch.setitem(sys.modules, "qaroma.inference.open", inference)
    return record


def test_every_command_is_found() -> None:
    assert set(COMMANDS) >= {(), ("finetune",), ("generate",), ("evaluate",), ("data",), ("data", "preview")}


@pytest.mark.parametrize("path", list(COMMANDS), ids=" ".join)
def test_help_is_instant_and_imports_no_torch(path: tuple[str, ...]) -> None:
    """The help itself is timed in a process of its own; the best of five counts."""
    script = (
        "import sys\nfrom qaroma.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    best = float("inf")
    for _ in range(5):
        start = computing()
        done = subprocess.run(
            [sys.executable, "-c", script, *path, "--help"],
            cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False,
        )  # fmt: skip
        best = min(best, computing() - start)
        assert done.returncode == 0, done.stderr
        assert "Usage: qaroma" in done.stdout
        if best < HELP_SECONDS:
            break
    if best >= HELP_SECONDS:
        start = computing()
        subprocess.run([sys.executable, "-c", "import click"], cwd=ROOT, timeout=60, check=True)
        assert best < HELP_IMPORTS * (computing() - start)


@pytest.mark.parametrize("path", [path for path in COMMANDS if path and path != ("data",)], ids=" ".join)
def test_every_command_and_option_is_explained(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    assert command.epilog
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("path", list(COMMANDS), ids=" ".join)
def test_help_speaks_to_people(path: tuple[str, ...]) -> None:
    """No words of Python, and no reason that is a citation."""
    command = COMMANDS[path]
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    assert not [text for text in texts if text and re.search(r"\bNone\b|\bMETHOD\b|\beq\. ?\d|\(paper", text)]


@pytest.mark.parametrize("field", config_fields().items(), ids=lambda field: field[0])
def test_settings_are_described_to_people(field: tuple[str, Any]) -> None:
    assert not re.search(r"\bNone\b|\bMETHOD\b|\beq\. ?\d|\(paper", field[1].description)


def test_the_group_lists_each_command_with_its_line() -> None:
    text = typed("--help").stdout
    assert DECLARED
    for name, line in DECLARED.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)


def test_a_newcomer_reads_first_what_to_type_first() -> None:
    text = typed("--help").stdout
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert titles == ["Options", *SECTIONS.values()]
    first = text.partition("Begin here:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\S+)", first, re.MULTILINE) == ["demo", "finetune", "chat", "export", "page"]


def test_the_bars_of_libraries_look_as_ours_in_a_terminal_and_are_silent_in_a_log() -> None:
    script = (
        "import io, sys\nfrom qaroma.cli import main\nsys.stderr.isatty = lambda: sys.argv[1] == 'terminal'\n"
        "main(['--version'])\nfrom tqdm.auto import tqdm\nshown = io.StringIO()\n"
        "bar = tqdm(total=4, desc='Loading weights', file=shown, initial=2)\nprint(shown.getvalue())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TQDM")}
    shown = {}
    for where in ("terminal", "log"):
        command = [sys.executable, "-c", script, where]
        done = subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, encoding="utf-8", check=True
        )
        shown[where] = done.stdout
    assert re.search("Loading weights \\S*━{15} {15}\\S* 2/4 00:00", shown["terminal"])
    assert "━" not in shown["log"]


def test_option_texts_defaults_and_choices_come_from_the_configuration() -> None:
    fields = config_fields()
    from_fields = 0
    for option in COMMANDS["finetune",].params:
        key = str(option.name).replace("__", ".")
        if not isinstance(option, click.Option) or key not in fields:
            continue
        from_fields += 1
        assert option.help is not None
        assert option.help.startswith(str(fields[key].description))
        if fields[key].default not in (None, False) and not fields[key].default_factory:
            assert f"[default: {fields[key].default}]" in option.help
    assert from_fields == 28


def test_finetune_passes_every_flag_on(
    called: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {train: old.jsonl}\ntraining: {grad_accum: 7}\n", encoding="utf-8")
    flags = (
        "--model m --data a.jsonl:2 --data C:\\b.jsonl --data-format alpaca --validation v.jsonl --output o "
        "--method lora --rank 4 --max-steps 5 --epochs 2 --learning-rate 1e-3 --micro-batch 3 --max-length 99 "
        "--on-too-long truncate --skip-bad-rows --train-on all --seed 0 --device cpu --quantization fp4 "
        "--trust-remote-code --set growth.alpha=3 --set growth.dropout=0.1 --json"
    )
    assert main(["finetune", "--config", str(file), *flags.split(" ")]) == 0
    expected = Config.model_validate(
        {
            "model": {"name": "m", "quantization": "fp4", "trust_remote_code": True},
            "data": {
                "train": [{"path": "a.jsonl", "weight": 2}, {"path": "C:\\b.jsonl"}],
                "format": "alpaca", "validation": "v.jsonl", "max_length": 99, "on_too_long": "truncate",
                "skip_bad_rows": True, "train_on": "all",
            },
            "output": "o", "method": "lora", "rank": 4,
            "training": {
                "max_steps": 5, "epochs": 2, "learning_rate": 1e-3, "micro_batch": 3, "grad_accum": 7, "seed": 0,
                "device": "cpu",
            },
            "growth": {"alpha": 3, "dropout": 0.1},
        }
    )  # fmt: skip
    assert called["positional"] == (expected,)
    assert called["resume"] is False
    out, err = capsys.readouterr()
    assert json.loads(out) == {"steps": 3, "loss": None}
    assert "chatter" in err


def test_finetune_leaves_model_and_data_to_the_run_that_is_resumed(called: dict[str, Any]) -> None:
    assert main(["finetune", "--resume", "--output", "runs/x", "--max-steps", "9"]) == 0
    assert called["resume"] is True
    # Only what was typed counts as set: the rest comes from the run's own configuration.
    typed_settings = called["positional"][0].model_dump(exclude_unset=True)
    assert typed_settings == {"output": "runs/x", "training": {"max_steps": 9}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "got no model and no data; expected --model"),
        (["--model", "m"], "got no data; expected --data FILE;"),
        (["--config", "quikstart"], "did you mean quickstart?"),
        (["--set", "growth.eps_ot=1"], "did you mean growth.eps_out?"),
    ],
)
def test_finetune_says_what_is_missing(
    arguments: list[str], expected: str, called: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert err.startswith("error: ")
    assert not out
    assert not called


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "8"], "got rank 8, but aroma chooses ranks; leave it out, or type --method lora, which takes one"),
        (["--set", "rank=16"], "got rank 16, but aroma chooses ranks"),
        (["--config", "ranked.yaml"], "got rank 4, but aroma chooses ranks"),
        (["--method", "lora", "--set", "growth.t_in=9"], "got growth.t_in, which method lora"),
        (["--method", "relora", "--set", "growth.eps_in=1"], "got growth.eps_in, which method relora"),
        (["--set", "training.head_learning_rate=1"], "got training.head_learning_rate, which method aroma with task"),
    ],
)
def test_a_setting_that_the_method_leaves_aside_is_refused(
    arguments: list[str], expected: str, called: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("ranked.yaml").write_text("rank: 4\n", encoding="utf-8")
    assert main(["finetune", "--model", "m", "--data", "a.jsonl", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not called
    # What a run's own configuration says of other methods is no wish.
    Path("run.yaml").write_text("rank: 8\ngrowth: {t_in: 9}\n", encoding="utf-8")
    assert main(["finetune", "--model", "m", "--data", "a.jsonl", "--config", "run.yaml"]) == 0
    assert main(["finetune", "--model", "m", "--data", "a.jsonl", "--config", "run.yaml", "--method", "lora"]) == 0


def test_generate_passes_prompts_and_stdin_on(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("second é\n\nthird\n"))
    assert main(["generate", "runs/x", "first", "-", "--max-new-tokens", "9", "--base", "b", "--device", "cpu"]) == 0
    assert called["positional"] == ("runs/x", ["first", "second é", "third"])
    assert (called["max_new_tokens"], called["base"], called["device"]) == (9, "b", "cpu")
    assert "> second é\n<second é>\n" in capsys.readouterr().out


def test_generate_prints_one_answer_alone_and_json_keeps_stdout_clean(
    called: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "runs/x", "hé"]) == 0
    assert capsys.readouterr().out == "chatter of a library\n<hé>\n"
    assert main(["generate", "runs/x", "hé", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"answers": [{"prompt": "hé", "answer": "<hé>"}]}
    assert "chatter" in err
    assert called["device"] == "auto"


def test_generate_refuses_an_empty_stdin(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", "runs/x", "-"]) == 2
    assert "no prompt" in capsys.readouterr().err
    assert not called


def test_evaluate_passes_its_options_on(called: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--data a.jsonl:2 --data b --rows 5 --data-format text --max-new-tokens 7 --base m --device cpu"
    assert main(["evaluate", "runs/x", *flags.split(), "--skip-bad-rows", "--json"]) == 0
    assert called["positional"] == ("runs/x", [("a.jsonl", 2.0), ("b", 1.0)])
    named = {key: called[key] for key in ("data_format", "rows", "max_new_tokens", "base", "device", "skip_bad")}
    assert named == {
        "data_format": "text", "rows": 5, "max_new_tokens": 7, "base": "m", "device": "cpu", "skip_bad": True,
    }  # fmt: skip
    out, err = capsys.readouterr()
    # JSON has no infinity.
    assert json.loads(out) == {"loss": 1.5, "perplexity": None}
    assert "chatter" in err


def test_evaluate_prints_figures_for_people(called: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/x", "--data", "a"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["loss        1.5", "perplexity  inf"]
    assert (called["rows"], called["data_format"], called["skip_bad"]) == (None, "auto", False)


def test_shares_are_printed_in_per_cent_as_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    write_figures({"exact_match": 1.0, "loss": 0.25})
    assert capsys.readouterr().out == "exact match  100.0 %\nloss         0.25\n"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (QaromaError("got é; expected e"), 2, "error: got é; expected e\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_command_raises_becomes_an_exit_code(
    raised: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    run = types.ModuleType("qaroma.training.finetune")
    run.__dict__["finetune"] = fail
    monkeypatch.setitem(sys.modules, "qaroma.training.finetune", run)
    assert main(["finetune", "--model", "m", "--data", "d"]) == code
    out, err = capsys.readouterr()
    assert err.lstrip("\n") == message
    assert not out


def test_a_fault_of_ours_keeps_its_traceback(called: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qaroma.training.finetune", types.ModuleType("qaroma.training.finetune"))
    with pytest.raises(ImportError):
        main(["finetune", "--model", "m", "--data", "d"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["finetune", "--config", "nowhere.yaml"], "error: got nowhere.yaml; there is no such configuration"),
        (["finetune", "--lerning-rate", "1"], "--learning-rate"),
        (["finetune", "--lr", "1"], "No such option '--lr'. Did you mean '--learning-rate'?"),
        (["finetune", "--per_device_train_batch_size", "1"], "--micro-batch"),
        (["finetune", "--learning-rate", "0"], "0.0 is not in the range 0<x<="),
        (["finetune", "--learning-rate", "fast"], "'fast' is not a valid number."),
        (
            ["finetune", "--epochs", "3", "mine.csv"],
            "unexpected extra argument (mine.csv). Did you mean '--data mine.csv'?",
        ),
        (["finetune", "smollm2-135m", "mine.csv"], "(smollm2-135m mine.csv). Did you mean '--model smollm2-135m'?"),
        (["evaluate", "runs/x", "t.jsonl", "--data", "d"], "(t.jsonl). Did you mean '--data t.jsonl'?"),
        (["chat", "runs/x", "runs/y"], "unexpected extra argument (runs/y)\n"),
        (["finetune", "--columns", "a,b"], "error: --columns: got 'a,b'; expected KEY=NAME pairs"),
        (["finetune", "--data", "a.jsonl:0"], "error: --data: got 0.0; expected a number above 0"),
        (["finetune", "--device", "gpu"], "'auto', 'cuda', 'cpu'"),
        (["finetunee"], "did you mean finetune?"),
        (["zzz"], "expected one of demo, finetune"),
        (["data", "preveiw"], "did you mean preview?"),
        (["generate", "runs/x"], "PROMPT"),
        (["evaluate", "runs/x"], "--data"),
        (["finetune", "--set", "trainning.seed=1", "--set", "rnak=2"], "2 problems in the configuration"),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(arguments: list[str], expected: str, tmp_path: Path) -> None:
    done = typed(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_misspelt_key_of_a_file_names_file_line_and_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  nmae: x\n", encoding="utf-8")
    done = typed("finetune", "--config", "mine.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: mine.yaml line 2: model.nmae: unknown key; did you mean model.name?\n"


def test_version() -> None:
    done = typed("--version")
    assert (done.returncode, done.stdout) == (0, f"qaroma {__version__}\n")


def test_text_is_utf8_whatever_the_console_says(tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['qaroma', 'finetune', '--config', 'é.yaml']; from qaroma.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert "é.yaml" in done.stderr.decode("utf-8")


def test_data_preview_marks_what_is_trained(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = types.ModuleType("qaroma.model.base")
    base.__dict__["load_tokenizer"] = lambda name, **_: tokenizer
    monkeypatch.setitem(sys.modules, "qaroma.model.base", base)
    monkeypatch.setattr("qaroma.model.found.find_model", lambda name, **_: types.SimpleNamespace(vocabulary=None))
    rows = [{"instruction": f"[q{number}]", "output": f"[a{number}]"} for number in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    arguments = ["--model", "m", "--data", str(tmp_path / "rows.json"), "--examples", "1", "--rows", "3"]
    assert main(["data", "preview", *arguments]) == 0
    out = capsys.readouterr().out
    assert "[q0]" in out
    assert "⟦[a0]<|im_end|>⟧" in out
    assert "[q1]" not in out
    assert "3 of 5 rows, form alpaca, template chat" in out
    assert "3 examples of" in out
    assert main(["data", "preview", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    ((whole,),) = told["examples"]
    assert whole["pieces"][-1] == [True, "[a0]<|im_end|>"]
    assert [trained for trained, _ in whole["pieces"]] == [False, True]
    assert told["form"] == "alpaca"
    bad = [*rows, {"instruction": "[q5]", "output": ""}, "no object"]
    (tmp_path / "rows.json").write_text(json.dumps(bad), encoding="utf-8")
    assert main(["data", "preview", *arguments[:4], "--skip-bad-rows"]) == 0
    out = capsys.readouterr().out
    assert "7 of 7 rows, form alpaca" in out
    assert "5 examples of" in out
    assert "2 bad rows left out, the first: " in out
    assert main(["data", "preview", *arguments[:4], "--skip-bad-rows", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("2 bad rows left out, the first: ")
    long = [{"instruction": "long " * 400, "output": "[a]"}]
    (tmp_path / "rows.json").write_text(json.dumps(long), encoding="utf-8")
    assert main(["data", "preview", *arguments[:4]]) == 0
    cut = capsys.readouterr().out
    assert "characters, --full shows them ...]" in cut
    assert "⟦[a]<|im_end|>⟧" in cut
    assert len(cut) < 700
    assert main(["data", "preview", *arguments[:4], "--full"]) == 0
    assert "long " * 400 in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch has expandable segments on Linux alone")
def test_torch_is_asked_for_segments_that_can_grow_unless_the_user_has_said_what_he_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for before, after in (("", "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", before)
        if not before:
            del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
        main(["--version"])
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == after
