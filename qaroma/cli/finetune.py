"""``qaroma finetune``."""

from __future__ import annotations

import os

import click

from qaroma.cli.options import CONFIG_OPTION, SET_OPTION, config_options, count, read_config, typed_keys
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.errors import QaromaError
from qaroma.training.checks import check_finetune

_EPILOG = """\b
Examples:
  qaroma finetune --config quickstart --output runs/quickstart
  qaroma finetune --model smollm2-135m --data mine.jsonl --dry-run
  qaroma finetune --model smollm2-135m --data mine.jsonl --output runs/mine --prompt "a question of yours"
  qaroma finetune --model smollm2-135m --data mine.jsonl --output runs/two --gpus 2
"""


@click.command(epilog=_EPILOG)
@CONFIG_OPTION
@config_options(
    "model.name",
    "model.adapter",
    "data.train",
    "data.format",
    "data.columns",
    "data.feedback",
    "data.tools",
    "data.validation",
    "output",
    "task",
    "method",
    "rank",
    "training.max_steps",
    "training.epochs",
    "training.learning_rate",
    "training.micro_batch",
    "training.grad_accum",
    "data.max_length",
    "data.on_too_long",
    "data.skip_bad_rows",
    "data.train_on",
    "training.seed",
    "training.device",
    "training.memory",
    "training.track",
    "evaluation.prompts",
    "model.quantization",
    "model.trust_remote_code",
)
@click.option("--dry-run", is_flag=True, help="Only say what the run would be: settings with their reasons, memory, "
              "disk. No weight is loaded and nothing is written.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="Print every setting that was decided, with its reason.")
@click.option("--gpus", type=count(), metavar="INTEGER", help="Cards of this machine that train the run together, one "
              "process a card: they share the micro-batches of a step, and the run is that of one card.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint of the run in --output.")
@SET_OPTION
@JSON_OPTION
def command(
    config: str | None,
    dry_run: bool,
    verbose: bool,
    gpus: int | None,
    resume: bool,
    sets: tuple[str, ...],
    json_output: bool,
    **parameters: str | float | bool | None,
) -> None:
    """Fine-tune a model on your data.

    Settings come from the YAML file, overridden by the options below, overridden by --set. A
    setting that is nowhere given follows from the data, the model and the device; what was chosen
    stands in the run's config.yaml, with its reason.
    """
    if resume and dry_run:
        raise QaromaError("got --dry-run with --resume; a run that goes on stays what it was. Leave one of them out")
    settings = read_config(config, parameters, sets)
    check_finetune(settings, resume=resume, typed=typed_keys(parameters, sets))
    begun_by_launcher = os.environ.get("WORLD_SIZE", "1") != "1"
    if gpus is not None and gpus > 1 and not dry_run and not begun_by_launcher:
        from qaroma.training.launch import launch

        context = click.get_current_context()
        context.exit(launch(gpus, context.find_root().obj, settings.training.device))

    with figures_only(json_output) as write:
        if dry_run:
            from qaroma.training.forecast import rehearse

            figures = rehearse(settings)
        else:
            from qaroma.training.finetune import finetune

            figures = finetune(settings, resume=resume, verbose=verbose)
        if json_output and figures:
            write(figures)
