"""Checkpoints that a kill cannot tear: safetensors and JSON, written aside, checked when read.

A checkpoint is a directory ``step-00000040`` with ``state.safetensors`` (every tensor, by name) and
``state.json`` (version, base fingerprint, step, all other values, and one digest over all of it). Where
validations have chosen a best adapter by then, that lies in it as ``best``, so that it is there when the
run goes back to this step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.method import on_adapter, peft_lora
from qaroma.method.base import MethodState
from qaroma.method.factors import Factors
from qaroma.runs.adapter_info import AdapterInfo
from qaroma.runs.directory import STATE
from qaroma.runs.files import copy_files, directory_written_aside, remove_directory, unused
from qaroma.text.json_text import parse_json

VERSION = 2  # 1: qaroma 0.1.0, with the optimiser's flat buffers in the place of named factors
TENSORS, BEST = "state.safetensors", "best"
_NAME = re.compile(r"step-(\d{8,})")
_METHOD = "method."
_BLOCK = 1 << 20
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` optimiser steps.

    ``tensors`` are grouped by prefix (``method.``, ``random.``; a task's own trained tensors join
    under theirs); ``values`` are JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @classmethod
    def of(
        cls,
        step: int,
        method: str,
        state: MethodState,
        *,
        values: Mapping[str, Any],
    ) -> Checkpoint:
        """A checkpoint of a method's state.

        Args:
            step: optimiser steps done.
            method: its name.
            state: of the method.
            values: of the run beside it.
        """
        tensors = {f"{_METHOD}{name}": tensor for name, tensor in state.tensors.items()}
        return cls(step, tensors, {**values, "method": {"name": method, **state.values}})

    def not_finite(self) -> str | None:
        """The name of a tensor that holds numbers that are not finite; None where all are sound."""
        return next((name for name, tensor in self.tensors.items() if not bool(tensor.isfinite().all())), None)

    def method_state(self) -> MethodState:
        """What :meth:`of` was given of the method."""
        tensors = {k.removeprefix(_METHOD): t for k, t in self.tensors.items() if k.startswith(_METHOD)}
        return MethodState(tensors, self.values["method"])


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, fingerprint: str, best: Path | None = None) -> Path:
    """Write ``folder/step-N``.

    Args:
        folder: of the run's checkpoints.
        checkpoint: of this moment; see :meth:`Checkpoint.not_finite`.
        fingerprint: of the base model.
        best: the best adapter until then.

    Returns:
        The checkpoint's directory.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    with directory_written_aside(path) as aside:
        tensors = aside / TENSORS
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in checkpoint.tensors.items()}, tensors)
        header = {"version": VERSION, "base": fingerprint, "step": checkpoint.step, "values": checkpoint.values}
        text = json.dumps({**header, "sha256": _digest(header, tensors)})
        (aside / STATE).write_text(text, encoding="utf-8")
        if best is not None:
            copy_files(best, aside / BEST)
    return path


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest checkpoints; what has another name stays."""
    for old in list_checkpoints(folder)[:-count]:
        remove_directory(old)


def set_aside(path: Path, reason: str) -> Path:
    """Take a checkpoint out of the line without removing it: ``step-00000040.damaged``; returns where it is now."""
    return path.rename(unused(path.with_name(f"{path.name}.{reason}")))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; what was set aside or is half written has another name."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint directory."""
    return int(path.name.removeprefix("step-"))


def load_newest(folder: Path, *, fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a sentence about each damaged one that was passed over.

    Raises:
        QaromaError: a checkpoint of another base model, or of another version of the format.
    """
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            found, trained_on = _load(path)
            if found.step != step_of(path):
                raise ValueError(f"it is of step {found.step}")
        except _DAMAGED as error:
            warnings.append(f"checkpoint {path} is damaged ({error}); falling back to the one before")
            continue
        if trained_on != fingerprint:
            raise QaromaError(
                f"{path} was trained on another base model (fingerprint {trained_on}, this one is {fingerprint}); "
                "give the --model it began with"
            )
        return found, warnings
    return None, warnings


def adapter_in(path: Path) -> tuple[AdapterInfo, dict[str, Factors]]:
    """The adapter in a checkpoint as the model had it then, active components included.

    Args:
        path: the checkpoint's directory.

    Returns:
        What it remembers, and the factors of every target module, as the forward pass has them.

    Raises:
        QaromaError: a damaged checkpoint, or one of another version of the format.
    """
    try:
        checkpoint, _ = _load(path)
        state = checkpoint.method_state()
        # Methods on our own adapter have components; PEFT's have its parameters.
        factors_in = on_adapter.factors_in if "components" in state.values else peft_lora.factors_in
        return AdapterInfo.from_json(checkpoint.values["adapter"]), factors_in(state)
    except _DAMAGED as error:
        raise QaromaError(f"{path} is damaged ({error!r}); name another checkpoint of its run") from error


def _load(path: Path) -> tuple[Checkpoint, str]:
    """A checkpoint whose digest is right, and the fingerprint of its base."""
    header: dict[str, Any] = parse_json((path / STATE).read_text(encoding="utf-8"))
    told, tensors = header.pop("sha256"), path / TENSORS
    old = header["version"] < VERSION
    if told != (_file_digest(tensors).hexdigest() if old else _digest(header, tensors)):
        raise ValueError("its files do not match its digest")
    if header["version"] > VERSION:
        raise QaromaError(f"{path} has version {header['version']}, this qaroma reads up to {VERSION}; upgrade qaroma")
    if old:
        raise QaromaError(
            f"{path} was written by qaroma 0.1.0, whose checkpoints this version cannot go on from; finish the run "
            "with that version (pip install qaroma==0.1.0), or begin it anew with another --output. "
            "Its adapter, where it has one, opens as before"
        )
    found = Checkpoint(header["step"], load_file(tensors), header["values"])
    ruined = found.not_finite()
    if ruined is not None:
        raise ValueError(f"{ruined} holds numbers that are not finite")
    return found, header["base"]


def _digest(header: Mapping[str, Any], tensors: Path) -> str:
    """Of every value and every tensor. The values are taken as JSON gives them back, in one spelling."""
    values = json.loads(json.dumps(header))
    digest = _file_digest(tensors)
    digest.update(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest
