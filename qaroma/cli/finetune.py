"""``qaroma finetune``."""

from __future__ import annotations

import click

from qaroma.cli.options import CONFIG_OPTION, SET_OPTION, config_options, read_config, typed_keys
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.training.checks import check_finetune

_EPILOG = """\b
Examples:
  qaroma finetune --config configs/quickstart.yaml
  qaroma finetune --model smollm2-135m --data mine.jsonl --output runs/mine --set growth.eps_out=1e-3
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
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint of the run in --output.")
@SET_OPTION
@JSON_OPTION
def command(
    config: str | None, resume: bool, sets: tuple[str, ...], json_output: bool, **parameters: str | float | bool | None
) -> None:
    """Fine-tune a model on your data.

    Settings come from the YAML file, overridden by the options below, overridden by --set. A
    setting that is nowhere given follows from the data, the model and the device; what was chosen
    is printed with its reason.
    """
    settings = read_config(config, parameters, sets)
    check_finetune(settings, resume=resume, typed=typed_keys(parameters, sets))

    from qaroma.training.finetune import finetune

    with figures_only(json_output) as write:
        figures = finetune(settings, resume=resume)
        if json_output:
            write(figures)
