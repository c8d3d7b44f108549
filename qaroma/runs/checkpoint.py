"""Checkpoints that a kill cannot tear: safetensors and JSON, written aside, checked when read.

A checkpoint is a directory ``step-00000040`` with ``state.safetensors`` (every tensor) and
``state.json`` (version, base fingerprint, step, digest of the tensors, all other values).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qaroma.errors import QaromaError
from qaroma.runs.files import directory_written_aside

VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` optimiser steps.

    ``tensors`` are grouped by prefix (``method.``, ``random.``; a task's own trained tensors join
    under theirs); ``values`` are JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, fingerprint: str, keep: int) -> Path:
    """Write ``folder/step-N`` and remove all but the newest ``keep`` checkpoints.

    Returns:
        The checkpoint's directory.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    with directory_written_aside(path) as aside:
        tensors = aside / "state.safetensors"
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in checkpoint.tensors.items()}, tensors)
        header = {
            "version": VERSION,
            "base": fingerprint,
            "step": checkpoint.step,
            "sha256": hashlib.sha256(tensors.read_bytes()).hexdigest(),
            "values": checkpoint.values,
        }
        (aside / "state.json").write_text(json.dumps(header), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; half-written ones have another name."""
    return sorted(p for p in folder.glob("step-*") if p.suffix not in (".part", ".old"))


def load_newest(folder: Path, *, fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a sentence about each damaged one that was passed over.

    Raises:
        QaromaError: a checkpoint of another base model or of a newer version.
    """
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return _load(path, fingerprint), warnings
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.append(f"checkpoint {path} is damaged ({error}); falling back to the one before")
    return None, warnings


def _load(path: Path, fingerprint: str) -> Checkpoint:
    header: Mapping[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if header["version"] > VERSION:
        raise QaromaError(f"{path} has version {header['version']}, this qaroma reads up to {VERSION}; upgrade qaroma")
    if header["base"] != fingerprint:
        raise QaromaError(
            f"{path} was trained on another base model (fingerprint {header['base']}, this one is {fingerprint}); "
            "give the --model it began with"
        )
    tensors = path / "state.safetensors"
    if hashlib.sha256(tensors.read_bytes()).hexdigest() != header["sha256"]:
        raise ValueError("state.safetensors does not match its digest")
    return Checkpoint(header["step"], load_file(tensors), header["values"])
