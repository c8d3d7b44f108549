"""What may change when a run goes on, and the configuration that it goes on with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from qaroma.config.load import lies_in, read_settings
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.runs.directory import RunDirectory

# Settings that may differ when a run goes on; all others would make it another run.
RESUMABLE = ("training.max_steps", "training.epochs", "training.learning_rate", "training.head_learning_rate",
             "training.evaluate_every", "training.patience", "training.device",
             "training.memory", "training.track", "checkpoint", "evaluation",
             "output")  # fmt: skip
FIXED = ("evaluation.metric",)  # of those: the best adapter so far was chosen by it


def resumed_config(given: Config) -> Config:
    """The run's own configuration, with what may change taken from the command line.

    Args:
        given: what was typed to go on: ``output`` names the run, other settings must be its own or resumable.

    Raises:
        QaromaError: no run there, or settings that would make it another run.
    """
    run = RunDirectory(given.output) if given.output else None
    if run is None or not run.exists():
        where = f"{run.path} holds no run" if run else "no --output given"
        raise QaromaError(f"cannot resume: {where}; type --resume --output runs/NAME (qaroma runs lists them)")
    stored = read_settings(run.config, {}, [])
    if stored.model.trust_remote_code and not given.model.trust_remote_code:
        raise QaromaError(
            f"{run.path} was begun with --trust-remote-code, so that its base may run Python code of its own; "
            f"type that again to go on: {run.resume_command}"
        )
    ours, theirs = _given(stored), _given(given)
    changed = {key: value for key, value in theirs.items() if value is not None and ours.get(key) != value}
    refused = [
        f"{key} was {ours.get(key)}, now {value}"
        for key, value in changed.items()
        if lies_in(key, FIXED) or not lies_in(key, RESUMABLE)
    ]
    if refused:
        raise QaromaError(
            f"cannot resume {run.path} with other settings: {'; '.join(refused)}. "
            "Leave them as they were, or begin a new run with another --output"
        )
    for key, value in changed.items():
        _set(stored, key, value)
    if "training.epochs" in changed and "training.max_steps" not in changed:
        stored.training.max_steps = None  # that of the run stands in its configuration, and would win
    if stored.training.optimizer is None:
        stored.training.optimizer = "adamw"  # runs of 0.4.0 and before had no other, and do not say it
    stored.output = str(run.path)
    return stored


def _given(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of all that was set, in a file, by a flag or from the data."""
    given: dict[str, Any] = {}
    dumped = section.model_dump()
    for name in section.model_fields_set:
        value = getattr(section, name)
        given.update(
            _given(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": dumped[name]}
        )
    return given


def _set(config: Config, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    setattr(target, name, value)
