"""What the model that a run of preferences starts from makes of the answers: computed once, and kept beside the run.

A run's new components add nothing at first, so that its model before the first step is the reference itself,
components that were loaded included. Kept as numbers it takes no memory while the run trains.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qaroma.data.example import Pair
from qaroma.engine.placement import head_quantization
from qaroma.runs.files import read_json, write_atomically
from qaroma.tasks.preference import Preference, answer_log_probabilities
from qaroma.training.session import Session

SAVE_SECONDS = 30.0  # between two savings of what is computed so far


def add_reference(session: Session, console: Console) -> None:
    """Give the pairs of a session their reference, from its run's file or, what is missing there, by its model.

    Args:
        session: its model as it starts; of another task than preference it is left alone.
        console: told how far it is.
    """
    task = session.task
    if not isinstance(task, Preference):
        return
    pairs: list[Pair] = [*session.train, *session.validation]
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].tokens)
    values = session.ranks.first(lambda: _values(session, task, [pairs[i] for i in order], console))
    for place, value in zip(order, values, strict=True):
        pairs[place] = replace(pairs[place], reference=value)
    session.train, session.validation = pairs[: len(session.train)], pairs[len(session.train) :]


def _values(session: Session, task: Preference, pairs: Sequence[Pair], console: Console) -> list[tuple[float, float]]:
    """The reference of each pair; what is computed is kept in the run's file."""
    key = _key(session)
    values = _read(session.run.reference, key)
    missing = pairs[len(values) :]
    if missing:
        console.print(f"reference: what the starting model makes of {len(missing)} pairs", highlight=False)
    saved = time.monotonic()
    try:
        device, size = session.accelerator.device, session.config.training.micro_batch
        for found in answer_log_probabilities(task, session.model, missing, device, batch=size):
            values += found
            if time.monotonic() - saved > SAVE_SECONDS:
                _write(session.run.reference, key, values)
                saved = time.monotonic()
                console.print(f"reference: {len(values)} of {len(pairs)} pairs", highlight=False)
    finally:
        if missing:
            _write(session.run.reference, key, values)
    return values


def _key(session: Session) -> str:
    """A digest of all that the reference depends on: the pairs, the base, its head, and what it has on at the start."""
    config = session.config
    told = [session.data_fingerprint, session.fingerprint, head_quantization(session.model), config.model.compute_dtype]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, factors in session.method.factors().items():
        if factors.B.any():
            digest.update(name.encode())
            for factor in factors.on_host():
                digest.update(factor.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> list[tuple[float, float]]:
    """What was computed before, in its order; nothing where there is no such file, or one of something else."""
    known = read_json(path)
    values = known.get("values")
    if known.get("key") != key or known.get("sha256") != _digest(key, values):
        return []
    return [(chosen, rejected) for chosen, rejected in known["values"]]


def _write(path: Path, key: str, values: list[tuple[float, float]]) -> None:
    write_atomically(path, json.dumps({"key": key, "values": values, "sha256": _digest(key, values)}))


def _digest(key: str, values: object) -> str:
    return hashlib.sha256(json.dumps([key, values]).encode()).hexdigest()
