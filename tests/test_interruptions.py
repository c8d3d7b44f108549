"""Interruptions of real life: a full disk, a card that is taken, a model that has only half arrived."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_training import make_config

from qaroma.cli import main
from qaroma.config.load import dump_config
from qaroma.errors import QaromaError
from qaroma.model.base import load_base
from qaroma.model.failures import explain
from qaroma.runs import checkpoint as checkpoint_module
from qaroma.runs import files as files_module
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import disk_full
from qaroma.runs.stop import StopRequest
from qaroma.training import fit as fit_module
from qaroma.training import setup as session_setup
from qaroma.training.interruptions import explain_interruption, interruptions_told

NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"
TAKEN = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.63 GiB"


@pytest.fixture
def typed(tiny_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    """A run of 8 steps with a checkpoint at every second one, as it is typed."""
    changes = {"training__max_steps": 8, "checkpoint__every": 2}
    config = make_config(tiny_folder, data_file, tmp_path / "run", **changes)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return ["finetune", "--config", str(file)]


def refused(typed: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with a sentence and exit code 2."""
    assert main(typed) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error[error.index("error: ") :].split())


def go_on(tmp_path: Path) -> list[str]:
    return ["finetune", "--resume", "--output", (tmp_path / "run").as_posix()]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (SafetensorError(NO_SPACE), True),
        (SafetensorError("There is not enough space on the disk. (os error 112)"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Permission denied (os error 13)"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_told_from_other_failures(error: Exception, full: bool) -> None:
    assert disk_full(error) == full


def test_any_command_says_that_the_disk_is_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise SafetensorError(NO_SPACE)

    monkeypatch.setattr("qaroma.config.shipped.list_shipped", full)
    assert "the disk is full" in refused(["configs", "ls"], capsys)
    monkeypatch.setattr("qaroma.config.shipped.list_shipped", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["configs", "ls"])


def test_the_disk_fills_at_a_checkpoint_and_the_run_goes_on_later(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real, calls = checkpoint_module.save_file, []

        def fill(tensors: dict, path: Path) -> None:
            calls.append(path)
            if len(calls) == 4:  # the first is of step 0
                raise SafetensorError(NO_SPACE)
            real(tensors, path)

        patch.setattr(checkpoint_module, "save_file", fill)
        said = refused(typed, capsys)
    assert "the disk is full: cannot write to" in said
    assert "The run is safe up to step 4." in said
    assert f"go on with: qaroma {' '.join(go_on(tmp_path))}" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    assert main(go_on(tmp_path)) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_disk_fills_before_the_first_file_and_at_the_last(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "replace", full)
        assert "cannot write to" in refused(typed, capsys)
    assert not RunDirectory(tmp_path / "run").exists()
    from qaroma.training import finetune as run_module

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_write_adapters", full)
        assert "The run is safe up to step 8." in refused(typed, capsys)
    assert main(go_on(tmp_path)) == 0


def test_the_card_is_taken_when_the_model_is_loaded(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def taken(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(TAKEN)

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", taken)
        said = refused(typed, capsys)
        assert "does not fit in the memory that is free on the GPU (CUDA out of memory" in said
        assert "Nothing is lost. See which programs hold the card with nvidia-smi" in said
    with monkeypatch.context() as patch:
        patch.setattr(session_setup, "fingerprint", taken)
        said = refused(typed, capsys)
        assert "nvidia-smi" in said
        assert "Nothing was begun, so nothing is lost." in said
        assert "type the same command again" in said
    assert not (tmp_path / "run").exists()
    assert main(typed) == 0


def test_the_card_is_taken_at_the_first_step_and_in_the_middle(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fit_module.accumulate, []

    def taken_from_the_fifth(*arguments: object, **named: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError(TAKEN)
        return real(*arguments, **named)  # type: ignore[arg-type]

    def taken(*_: object) -> None:
        raise torch.OutOfMemoryError(TAKEN)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_log_ranks", taken)  # comes before the first step, and nothing relieves it
        said = refused(typed, capsys)
        assert "the GPU has no memory left" in said
        assert "The run is safe up to step 0." in said
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "accumulate", taken_from_the_fifth)
        said = refused(go_on(tmp_path), capsys)
        assert "out of memory at the smallest memory level" in said
    assert main(go_on(tmp_path)) == 0


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("CUDA error: out of memory"), "nvidia-smi"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "nvidia-smi"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Close other programs"),
        (MemoryError(), "Close other programs"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write to"),
    ],
)
def test_other_ways_of_saying_it(error: Exception, says: str, tmp_path: Path) -> None:
    with pytest.raises(QaromaError, match=says) as told, interruptions_told(RunDirectory(tmp_path)):
        raise error
    assert told.value.__cause__ is error


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not() -> None:
    with StopRequest() as stop:
        for _ in range(2):  # Slurm and torchrun send one each
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_comes_from_inside_is_seen_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for error in (RuntimeError("shapes do not match"), KeyError("x"), FileNotFoundError(errno.ENOENT, "no", "other")):
        assert explain_interruption(error, run) is None
    with pytest.raises(KeyboardInterrupt), interruptions_told(run):
        raise KeyboardInterrupt


def test_a_download_that_was_not_finished(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    aside = folder / ".cache" / "huggingface" / "download" / "model.safetensors.incomplete"
    aside.parent.mkdir(parents=True)
    (folder / "model.safetensors").rename(aside)
    with pytest.raises(QaromaError, match=r"not downloaded whole\. What is there is kept: type the same hf download"):
        load_base(folder, device="cpu")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x", encoding="utf-8")
    shutil.rmtree(folder / ".cache")
    with pytest.raises(QaromaError, match=r"pointer of git-lfs, not weights\. Type in that folder: git lfs pull"):
        load_base(folder, device="cpu")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--org--half" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "f00.incomplete").touch()
    told = explain(OSError("org/half does not appear to have a file named model.safetensors"), "org/half")
    assert "HF_HUB_OFFLINE unset" in str(told)


def test_a_file_that_was_cut(
    tiny_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    typed = ["finetune", "--model", str(folder), "--data", str(data_file), "--output", str(tmp_path / "run")]
    for name, size, says in (("model.safetensors", 200_000, "are damaged (model.safetensors: "),
                             ("tokenizer.json", 9_000, "has a damaged JSON file")):  # fmt: skip
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:size])
        said = refused(typed, capsys)
        assert says in said
        assert "Download or copy" in said
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "run").exists()
