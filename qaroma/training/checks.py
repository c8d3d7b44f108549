"""Mistakes that show without opening a model or reading data, told before anything heavy is imported.

Nothing here imports torch, so that a mistyped path costs the fraction of a second that it takes to look.
"""

from __future__ import annotations

from pathlib import Path

from qaroma.config.load import require_model_and_data
from qaroma.config.schema import Config
from qaroma.data.sources import require_source
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.runs.directory import CONFIG, RunDirectory
from qaroma.training.resume import resumed_config


def check_finetune(config: Config, *, resume: bool = False) -> None:
    """Look at what a run names: where it is written, its model, its data.

    Args:
        config: as the user gave it.
        resume: the run in ``config.output`` is to go on.

    Raises:
        QaromaError: what is missing or in the way, and what to type.
    """
    if resume:
        config = resumed_config(config)
    name = require_model_and_data(config)
    if config.output is not None and not resume:
        RunDirectory(config.output).require_unused()
    require_model(name)
    folder = config.model.adapter
    if folder is not None and not (Path(folder) / CONFIG).is_file():
        raise QaromaError(f"{folder} holds no PEFT adapter; expected a folder with {CONFIG}")
    check_sources(config)


def check_sources(config: Config) -> None:
    """Look whether the files that a configuration names are there.

    Raises:
        QaromaError: one is missing or of an unknown kind.
    """
    named = [source.path for source in config.data.train]
    named += [path for path in (config.data.validation, config.evaluation.data) if path is not None]
    for path in named:
        require_source(path)
