"""Mistakes that show without opening a model or reading data, told before anything heavy is imported.

Nothing here imports torch, so that a mistyped path costs the fraction of a second that it takes to look.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qaroma.config.growth_presets import CRITERIA
from qaroma.config.load import require_model_and_data
from qaroma.config.methods import METHODS
from qaroma.config.resolved import ResolvedGrowthSection
from qaroma.config.schema import Config
from qaroma.data.sources import require_source
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.runs.directory import CONFIG, RunDirectory
from qaroma.training.resume import resumed_config

# What a method of fixed rank takes of the settings of growth.
OF_FIXED_RANK = {f"growth.{name}" for name in ResolvedGrowthSection.__annotations__}


def check_finetune(config: Config, *, resume: bool = False, typed: Collection[str] = ()) -> None:
    """Look at what a run names: where it is written, its model, its data.

    Args:
        config: as the user gave it.
        resume: the run in ``config.output`` is to go on.
        typed: dotted keys that were given on the command line; what else is set may stand in a file for other methods.

    Raises:
        QaromaError: what is missing or in the way, and what to type.
    """
    if resume:
        config = resumed_config(config)
    else:
        _refuse_unused(config, typed)
    name = require_model_and_data(config)
    if config.output is not None and not resume:
        RunDirectory(config.output).require_unused()
    require_model(name)
    folder = config.model.adapter
    if folder is not None and not (Path(folder) / CONFIG).is_file():
        raise QaromaError(f"{folder} holds no PEFT adapter; expected a folder with {CONFIG}")
    check_sources(config)


def _refuse_unused(config: Config, typed: Collection[str]) -> None:
    """See to it that nothing was asked for that the method would leave aside in silence.

    Raises:
        QaromaError: a setting that the method does not have.
    """
    method = METHODS[config.method]
    # A run's configuration names the default, whatever its method.
    if method.grows and ("rank" in typed or config.rank != Config.model_fields["rank"].default):
        raise QaromaError(
            f"got rank {config.rank}, but {config.method} chooses ranks; leave it out, or type --method lora, which "
            "takes one"
        )
    unused = [key for key in typed if method.grows and not method.criteria and key in CRITERIA]
    if not method.grows:
        unused = [key for key in typed if key.startswith("growth.") and key not in OF_FIXED_RANK]
    if config.writes_text:
        unused += [key for key in typed if key == "training.head_learning_rate"]
    if unused:
        raise QaromaError(
            f"got {', '.join(unused)}, which method {config.method} with task {config.task} does not have; leave it out"
        )


def check_sources(config: Config) -> None:
    """Look whether the files that a configuration names are there.

    Raises:
        QaromaError: one is missing or of an unknown kind.
    """
    named = [source.path for source in config.data.train]
    named += [path for path in (config.data.validation, config.evaluation.data) if path is not None]
    for path in named:
        require_source(path)
