"""Nothing of the user's is lost: folders that are not ours, runs that are damaged, in use, or ruined by their rate."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_training import make_config, records

from qaroma.cli import main
from qaroma.config.load import dump_config
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.export import exporter
from qaroma.export.exporter import export
from qaroma.runs import files as files_module
from qaroma.runs.adapter import read_adapter, write_adapter
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.checkpoint import list_checkpoints, load_newest
from qaroma.runs.directory import RunDirectory, find_adapter
from qaroma.runs.files import directory_written_aside, remove_leftovers, write_atomically
from qaroma.runs.lock import LOCK, locked
from qaroma.runs.log import MetricsLog
from qaroma.training import fit as fit_module
from qaroma.training.finetune import finetune

QUIET = Console(quiet=True)
CHANGES = {
    "training__max_steps": 6, "training__evaluate_every": 2, "checkpoint__every": 2, "training__micro_batch": 2,
    "training__grad_accum": 1, "training__memory": "0", "method": "lora", "rank": 2, "growth": {"warmup": 1},
}  # fmt: skip


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder, and what it holds."""
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*") if f.is_file() and f.name != LOCK}  # fmt: skip


def resume(run: Path, **settings: object) -> dict:
    return finetune(Config.model_validate({"output": str(run), **settings}), resume=True, console=QUIET)


def refused(typed: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with a sentence and exit code 2."""
    assert main(typed) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps; to be copied."""
    run = tmp_path_factory.mktemp("finished") / "run"
    finetune(make_config(tiny_folder, data_file, run, **CHANGES), console=QUIET)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, in a place of its own."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[], bool]:
    """Puts things of the user's where qaroma once wrote; says whether they are still there."""
    placed = [tmp_path / f"out{ending}" / "thesis" for ending in (".old", ".part", ".failed")]
    for path in placed:
        path.parent.mkdir()
        path.write_text("x")
    return lambda: all(path.read_text() == "x" for path in placed)


# 1. What lies beside an export


def test_an_export_leaves_alone_what_lies_beside_it(run: Path, tmp_path: Path, mine: Callable[[], bool]) -> None:
    for _ in range(2):  # new, and in the place of an earlier one
        export(run, ["peft"], output=tmp_path / "out")
        assert mine()
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out", "out.old", "out.part", "out.failed"}


def test_a_failed_self_test_is_kept_beside_what_is_there(
    run: Path, tmp_path: Path, mine: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qaroma.export.selftest.SelfTest.passed", False)
    with pytest.raises(QaromaError, match=r"kept in .*out\.failed-2 for a look"):
        export(run, ["peft"], output=tmp_path / "out")
    assert mine()
    assert (tmp_path / f"out{exporter.FAILED}-2" / "adapter_config.json").is_file()


def test_an_adapter_takes_the_place_of_adapters_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    with pytest.raises(QaromaError, match="holds other things and no adapter"):
        write_adapter(tmp_path / "mine", {}, AdapterInfo({}, 1, 1.0), base=None)
    assert (tmp_path / "mine" / "thesis").read_text() == "x"


def test_a_run_that_is_over_keeps_its_time_when_it_is_resumed(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "seconds": 12_345.0}))
    assert resume(run)["seconds"] == 12_345.0
    assert json.loads((run / "summary.json").read_text())["seconds"] == 12_345.0
    assert resume(run, training={"max_steps": 7})["seconds"] < 12_345.0  # it goes on: the time was another run's


# 2. A folder that is not ours, and no text at all


def test_a_folder_with_other_things_is_no_place_for_a_run(
    tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "p"
    (place / "adapter").mkdir(parents=True)
    (place / "checkpoints" / "step-00000001").mkdir(parents=True)
    (place / "adapter" / "mine").write_text("x")
    typed = ["finetune", "--model", str(tiny_folder), "--data", str(data_file), "--output", str(place)]
    said = refused(typed, capsys)
    assert "p holds other things (adapter, checkpoints) and no run" in said
    assert "Choose another --output" in said
    assert (place / "adapter" / "mine").read_text() == "x"
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused([*typed[:-1], str(tmp_path / "file")], capsys)


def test_what_a_killed_command_left_is_no_hindrance(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "new").require_unused()
    for name in (LOCK, "config.yaml.part-0123abcd"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).require_unused()


@pytest.mark.parametrize("option", ["--output", "--data", "--model"])
def test_an_empty_text_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "got an empty text" in refused(["finetune", option, ""], capsys)
    assert "got an empty text" in refused(["finetune", f"{option}="], capsys)


def test_an_empty_text_in_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('output: ""\nmodel: {name: " "}\ndata: {train: [{path: ""}]}\n')
    said = refused(["finetune", "--config", str(file)], capsys)
    for key in ("output", "model.name", "data.train"):
        assert key in said
    assert said.count("expected text that is not empty") == 3


# 3. No checkpoint that can be read


@pytest.mark.parametrize("how", ["damaged", "removed"])
def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(
    run: Path, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list_checkpoints(run / "checkpoints"):
        if how == "damaged":
            (path / "state.safetensors").write_bytes(b"x")
        else:
            shutil.rmtree(path)
    before = tree(run)
    said = refused(["finetune", "--resume", "--output", str(run), "--max-steps", "99"], capsys)
    for part in ("no whole checkpoint", "a log up to step 6", "adapter/ of step 6", "adapter_last/ of step 6",
                 "summary.json", "put a checkpoint back", "begin a new one: qaroma finetune --config"):  # fmt: skip
        assert part in said
    assert tree(run) == before
    command = said[said.index("qaroma finetune --config") :].replace("OTHER", str(tmp_path / "other"))
    assert main(shlex.split(command)[1:]) == 0


def test_a_run_that_was_killed_before_it_began_begins(
    tiny_folder: Path, data_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    config = make_config(tiny_folder, data_file, tmp_path / "run", **CHANGES)
    RunDirectory(tmp_path / "run").create(dump_config(config))
    assert resume(tmp_path / "run")["steps"] == 6


# 4. Two processes


def test_a_run_is_used_by_one_process(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(run):
        said = refused(["finetune", "--resume", "--output", str(run)], capsys)
        assert f"is in use by process {os.getpid()} on " in said
    assert not (run / LOCK).exists()


def test_a_lock_whose_file_cannot_be_removed_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with locked(tmp_path):
            pass
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from qaroma.runs.lock import locked; from pathlib import Path\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(QaromaError, match=f"in use by process {holder.pid} on "), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


CHILD = """
import sys, time
from qaroma.cli.attached import attach
attach()
try:  # the parent may be killed as soon as it has read this
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1], "w").close()
"""
PARENT = """
import signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup pass on that they ignore it
child = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
subprocess.Popen(child, stdin=subprocess.PIPE, start_new_session=True).wait()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_run_of_a_comparison_ends_with_it(number: int, tmp_path: Path) -> None:
    """A child that is started as a comparison starts its runs; the parent is killed."""
    ended = tmp_path / "ended"
    command = [sys.executable, "-c", PARENT, CHILD, str(ended)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Only what is of their kind is replaced by files and folders that are put in place.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX's")
def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # stands for /dev/null
    os.mkfifo(pipe)
    with pytest.raises(QaromaError, match="is there and is no folder"), directory_written_aside(pipe):
        pass
    with pytest.raises(QaromaError, match="is there and is no file"):
        write_atomically(pipe, "x")
    with pytest.raises(QaromaError, match="is no earlier export"):
        exporter._check_free(pipe)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.parametrize("target", ["mine", "nowhere", "link"])
def test_a_link_in_a_run_from_elsewhere_is_replaced_and_never_followed(target: str, tmp_path: Path) -> None:
    for kind in ("folder", "file", "lock"):
        (tmp_path / kind).mkdir()
    (tmp_path / "folder" / "mine").mkdir()
    (tmp_path / "folder" / "mine" / "precious").write_text("x")
    (tmp_path / "folder" / "link").symlink_to(target)
    with directory_written_aside(tmp_path / "folder" / "link") as aside:
        (aside / "new").write_text("y")
    assert (tmp_path / "folder" / "link" / "new").read_text() == "y"
    assert (tmp_path / "folder" / "mine" / "precious").read_text() == "x"
    assert {p.name for p in (tmp_path / "folder").iterdir()} == {"mine", "link"}
    for kind, name in (("file", "link"), ("lock", LOCK)):
        (tmp_path / kind / "mine").write_text("x")
        (tmp_path / kind / name).symlink_to(name if target == "link" else target)
    write_atomically(tmp_path / "file" / "link", "y")
    assert (tmp_path / "file" / "link").read_text() == "y"
    with pytest.raises(QaromaError, match="is a link; expected none in a run"), locked(tmp_path / "lock"):
        pass
    assert [(tmp_path / kind / "mine").read_text() for kind in ("file", "lock")] == ["x", "x"]


# 5. Numbers that are not finite


def poison_gradient(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The gradient of one step is not finite though its loss is, as after an overflow in the backward pass."""
    real, calls = fit_module.accumulate, []

    def poisoned(session, batches, *_):
        figures, norm = real(session, batches)
        calls.append(1)
        if len(calls) == at:
            session.method.trainer.optimiser.gradients[0] = torch.inf
            norm = session.method.gradient_norm().item()
        return figures, norm

    monkeypatch.setattr(fit_module, "accumulate", poisoned)


def printed_command(said: str) -> list[str]:
    """What a message tells the user to type."""
    return shlex.split(said[said.index("qaroma finetune --resume") :])[1:]


def require_sound(run: Path) -> None:
    if (run / "adapter").exists():
        read_adapter(run / "adapter")
    for path in list_checkpoints(run / "checkpoints"):
        assert all(bool(t.isfinite().all()) for t in load_file(path / "state.safetensors").values())


@pytest.mark.parametrize("at", [4, 5])  # between two checkpoints, and right after one
def test_a_gradient_that_is_not_finite_is_no_update(
    at: int, tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, finished: Path,
) -> None:  # fmt: skip
    run, file = tmp_path / "run", tmp_path / "c.yaml"
    file.write_text(dump_config(make_config(tiny_folder, data_file, run, **CHANGES)))
    with monkeypatch.context() as patch:
        poison_gradient(patch, at)
        said = refused(["finetune", "--config", str(file)], capsys)
    assert f"the gradient of step {at} is not finite (examples " in said
    assert "That step was not made. The run goes back to step 2; look at these rows" in said
    require_sound(run)
    command = printed_command(said)
    assert main(command[: command.index("--learning-rate")]) == 0  # at the same rate: the very same run
    assert tree(run / "adapter_last") == tree(finished / "adapter_last")


def test_a_rate_far_too_large_is_mended_by_what_is_printed(
    tiny_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, file = tmp_path / "run", tmp_path / "c.yaml"
    changes = {
        **CHANGES,
        "training__learning_rate": 4.0,
        "checkpoint__every": 1,
        "checkpoint__keep": 1,
    }
    file.write_text(dump_config(make_config(tiny_folder, data_file, run, **changes)))
    poison_gradient(monkeypatch, 4)
    said = refused(["finetune", "--config", str(file)], capsys)
    require_sound(run)
    assert "--learning-rate 5.0e-03" in said
    assert main(printed_command(said)) == 0
    require_sound(run)
    assert [s["step"] for s in records(run)] == list(range(1, 7))


def test_a_checkpoint_that_is_not_finite_is_passed_over(run: Path) -> None:
    from qaroma.runs import checkpoint as module

    newest = list_checkpoints(run / "checkpoints")[-1]
    tensors = load_file(newest / "state.safetensors")
    next(t for name, t in tensors.items() if name.startswith("method.active"))[0] = torch.nan
    save_file(tensors, newest / "state.safetensors")
    header = json.loads((newest / "state.json").read_text())
    header.pop("sha256")
    header["sha256"] = module._digest(header, newest / "state.safetensors")
    (newest / "state.json").write_text(json.dumps(header))
    found, warnings = load_newest(run / "checkpoints", fingerprint=header["base"])
    assert found is not None
    assert found.step == 4
    assert "not finite" in warnings[0]


# 6. Which checkpoints are kept


def test_damaged_and_foreign_checkpoints_do_not_count(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert [p.name for p in list_checkpoints(checkpoints)] == ["step-00000004", "step-00000006"]
    (checkpoints / "step-00000006" / "state.safetensors").write_bytes(b"x")
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000006-backup")
    resume(run, checkpoint={"keep": 1, "every": 1})
    assert {p.name for p in checkpoints.iterdir()} == {"step-00000006", "step-00000006.damaged", "step-00000006-backup"}
    header = json.loads((checkpoints / "step-00000006" / "state.json").read_text())
    assert load_newest(checkpoints, fingerprint=header["base"])[1] == []


# 7. The swap of two folders


def write_anew(target: Path) -> None:
    with directory_written_aside(target) as aside:
        (aside / "x").write_text("new")


def killed_at_move(number: int, patch: pytest.MonkeyPatch) -> None:
    """Let a process end right after one of its moves, without tidying up."""
    real, moves = Path.rename, []

    def rename(self: Path, to: Path) -> Path:
        if len(moves) >= number:
            raise KeyboardInterrupt
        moves.append(to)
        return real(self, to)

    patch.setattr(Path, "rename", rename)
    patch.setattr(files_module.shutil, "rmtree", lambda *_, **__: None)


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_a_folder_is_exchanged_in_one_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at_move(0, monkeypatch)  # no other move is made
    write_anew(run / "adapter")
    assert (run / "adapter" / "x").read_text() == "new"


def test_elsewhere_a_swap_that_was_cut_in_two_is_healed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(run / "adapter")
    monkeypatch.setattr(files_module, "exchange", lambda one, other: False)
    with monkeypatch.context() as patch:
        killed_at_move(1, patch)
        with pytest.raises(KeyboardInterrupt):
            write_anew(run / "adapter")
    assert not (run / "adapter").exists()
    assert find_adapter(run) == run / "adapter"
    assert tree(run / "adapter") == before
    write_anew(run / "adapter")
    assert (run / "adapter" / "x").read_text() == "new"
    remove_leftovers(run)
    assert not [p for p in run.iterdir() if ".part-" in p.name or ".old-" in p.name]


# 8. A damaged line of the log


def test_a_damaged_line_costs_only_itself(run: Path) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if line.startswith(b'{"step": 3'))
    lines[place] = b'{"step": 3, "lo\xff\n'
    log.write_bytes(b"".join(lines))
    console = Console(record=True, width=400, file=open(os.devnull, "w"))  # noqa: SIM115
    finetune(Config.model_validate({"output": str(run)}), resume=True, console=console)
    assert f"metrics.jsonl is damaged at line {place + 1}; the other lines are kept" in console.export_text()
    assert [r["step"] for r in MetricsLog(log).records() if "event" not in r] == [1, 2, 4, 5, 6]
    assert len(log.read_bytes().splitlines()) == len(lines)


# 9. The best adapter of a future that did not come


@pytest.mark.parametrize("links", [True, False])
def test_the_best_adapter_belongs_to_the_checkpoint(
    links: bool, tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    run = tmp_path / "run"
    config = make_config(tiny_folder, data_file, run, **{**CHANGES, "checkpoint__every": 4})
    real = fit_module.save_state

    def killed(session, state):
        if state.step == 6:  # after its better adapter was written
            raise KeyboardInterrupt
        return real(session, state)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, console=QUIET)
    assert read_adapter(run / "adapter").info.step == 6
    assert read_adapter(run / "checkpoints" / "step-00000004" / "best").info.step == 4
    figures = resume(run, training={"learning_rate": 1e-12})
    assert figures["best_step"] == read_adapter(run / "adapter").info.step


def test_an_adapter_that_no_checkpoint_knows_goes(
    tiny_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = make_config(tiny_folder, data_file, run, **{**CHANGES, "checkpoint__every": 4})
    real = fit_module._validate

    def killed(session, state, view):
        real(session, state, view)
        if state.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_validate", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, console=QUIET)
    assert read_adapter(run / "adapter").info.step == 2
    monkeypatch.setattr(fit_module, "_train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        resume(run)
    assert not (run / "adapter").exists()


# What an adapter and a checkpoint are checked by


@pytest.mark.parametrize("damage", ["flip", "nan", "huge", "negative", "scale"])
def test_a_damaged_adapter_is_a_sentence(run: Path, damage: str) -> None:
    folder = run / "adapter"
    weights, growth = folder / "adapter_model.safetensors", folder / "growth.json"
    values = json.loads(growth.read_text())
    name = next(iter(values["components"]))
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "nan":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0] = torch.nan
        save_file(tensors, weights)
        growth.write_text(json.dumps({key: value for key, value in values.items() if key != "sha256"}))
    elif damage == "scale":
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 3, "alpha_pattern": {}}))
    else:
        values["components"][name] = [10**9] if damage == "huge" else [3, -1]
        growth.write_text(json.dumps(values))
    with pytest.raises(QaromaError, match="is damaged" if damage != "nan" else "not finite"):
        read_adapter(folder)


def test_what_other_tools_rewrite_is_no_damage(run: Path) -> None:
    config = run / "adapter" / "adapter_config.json"
    values = {**json.loads(config.read_text()), "base_model_name_or_path": "elsewhere"}
    config.write_text(json.dumps(dict(reversed(values.items()))))
    read_adapter(run / "adapter")


@pytest.mark.parametrize("change", ["fewer", "reordered", "edited"])
def test_a_run_does_not_go_on_with_other_rows(
    change: str, tiny_folder: Path, data_file: Path, tmp_path: Path, finished: Path
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(finished, run)
    lines = data_file.read_text().splitlines()
    if change == "fewer":
        lines = lines[:-5]
    elif change == "reordered":
        lines.reverse()
    else:
        lines[7] = lines[7].replace("count 7", "count 9")
    rows.write_text("\n".join(lines) + "\n")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(data_file), str(rows)))
    before = tree(run)
    how = "57 examples then, 53 now" if change == "fewer" else "of another content or in another order"
    with pytest.raises(QaromaError, match=rf"its \w+ data changed since \(.*{how}\)"):
        resume(run, training={"max_steps": 8})
    assert tree(run) == before
