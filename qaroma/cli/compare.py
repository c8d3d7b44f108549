"""``qaroma compare``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import click

from qaroma.cli.options import CONFIG_OPTION, SET_OPTION, config_options, count, read_config
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.compare.specs import parse_seeds, plan_runs
from qaroma.config.load import require_model_and_data
from qaroma.config.schema import Config
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.runs.directory import quoted
from qaroma.training.checks import check_sources

_EPILOG = """\b
Examples:
  qaroma compare --config mrpc.yaml --methods aroma,lora:8,adalora:8 --seeds 0,1,2 --output runs/mrpc
  qaroma compare --config mrpc.yaml --methods "aroma,aroma+reset=none,lora:8+training.learning_rate=1e-3" \\
      --seeds 0,1,2 --output runs/reset
  qaroma compare --config mrpc.yaml --methods aroma,lora:8 --output runs/both --gpus 2
  qaroma compare --suite growth --data DATA --output runs/suite --beds text,minilm --tables oracle
"""


@click.command(epilog=_EPILOG)
@CONFIG_OPTION
@click.option(
    "--methods",
    metavar="NAME[:RANK][+KEY=VALUE]...",
    help="Methods, separated by commas: aroma, relora, lora, peft-lora, adalora. KEY is any setting of this method "
    "alone; those of growth need no prefix.",
)
@click.option("--seeds", default="0,1,2", show_default=True, metavar="NUMBERS", help="Seeds, separated by commas.")
@click.option("--output", required=True, metavar="FOLDER", help="Where runs, table and plot go.")
@config_options(
    "model.name",
    "data.train",
    "data.validation",
    "task",
    "training.max_steps",
    "training.epochs",
    "training.micro_batch",
    "training.grad_accum",
    "data.max_length",
    "training.device",
    "model.quantization",
)
@click.option("--gpus", type=count(1), metavar="INTEGER",
              help="Runs side by side, each on a GPU of its own. Default: one at a time.")  # fmt: skip
@click.option("--table-only", is_flag=True, help="Run nothing; make the table from the runs that are finished.")
@click.option(
    "--suite",
    type=click.Choice(["growth"]),
    help="Instead of --methods: judge growth against the best rank and rate of LoRA, on beds of its own. --data is "
    "then the folder of their files.",
)
@click.option("--ours", default="aroma", show_default=True, metavar="NAME[+KEY=VALUE]...", help="What a suite judges.")
@click.option("--beds", metavar="NAMES", help="Beds of a suite, or beginnings of their names; all where not given.")
@click.option(
    "--tables",
    default="oracle,ladder,planted",
    show_default=True,
    metavar="NAMES",
    help="Tables of a suite: oracle, ladder, planted, rate, paper, cost.",
)
@click.option("--jobs", type=count(1), default=2, show_default=True, metavar="INTEGER", help="Processes of a suite.")
@SET_OPTION
@JSON_OPTION
def command(
    config: str | None,
    methods: str | None,
    seeds: str,
    output: str,
    gpus: int | None,
    table_only: bool,
    suite: str | None,
    ours: str,
    beds: str | None,
    tables: str,
    jobs: int,
    sets: tuple[str, ...],
    json_output: bool,
    **parameters: str | float | bool | None,
) -> None:
    """Put methods side by side on your task: metric, parameters, ranks, time.

    Every method is trained with every seed on the same data for the same number of steps, each run
    in a process of its own. Runs that are finished are taken as they are and interrupted ones go on,
    so the same command continues whatever stopped it. Needs pip install 'qaroma[bench]' for PEFT's
    methods, and 'qaroma[report]' for the plot.
    """
    if suite is not None:
        if gpus is not None:
            raise QaromaError(f"got --gpus {gpus} with --suite; a suite runs on the CPU. Type: --jobs {gpus}")
        judged = _suite(
            output, seeds, parameters, ours=ours, beds=beds, tables=tables, jobs=jobs, table_only=table_only
        )
        _tell(judged, json_output)
        return
    if methods is None:
        raise click.UsageError("Missing option '--methods'.")

    def make_config(more: Sequence[str]) -> Config:
        return read_config(config, parameters, [*sets, *more])

    asked = read_config(config, parameters, sets)
    if gpus is not None and asked.training.device == "cpu":
        raise QaromaError(f"got --gpus {gpus} with device cpu; leave one of the two out")
    name = require_model_and_data(asked)
    if not table_only:
        require_model(name)
        check_sources(asked)
    plan_runs(make_config, methods, seeds, output)  # a mistake in them is told before torch is imported

    from qaroma.compare.compare import compare

    judged = partial(
        compare,
        make_config,
        methods=methods,
        seeds=seeds,
        folder=output,
        command=_typed(click.get_current_context()),
        gpus=gpus,
        table_only=table_only,
    )
    _tell(judged, json_output)


def _suite(output: str, seeds: str, parameters: Mapping[str, Any], **asked: Any) -> Callable[[], Mapping[str, Any]]:
    """What judges growth on a suite's beds; what was asked for is handed on as it is."""
    from qaroma.compare.suite.suite import run_suite

    context = click.get_current_context()
    typed = context.get_parameter_source("seeds") == click.core.ParameterSource.COMMANDLINE
    return partial(
        run_suite,
        folder=output,
        data=_data_folder(parameters),
        command=_typed(context),
        seeds=tuple(parse_seeds(seeds)) if typed else None,
        **asked,
    )


def _tell(judged: Callable[[], Mapping[str, Any]], json_output: bool) -> None:
    """Judge, and write the table, or all figures as JSON."""
    with figures_only(json_output) as write:
        results = judged()
        if json_output:
            write(results)
            return
    click.echo(results["table"])


def _data_folder(parameters: Mapping[str, Any]) -> str:
    """The one folder that ``--data`` names for a suite.

    Raises:
        QaromaError: none, or several.
    """
    folders = parameters["data__train"]
    if len(folders) != 1:
        raise QaromaError(f"got {len(folders)} times --data; a suite wants the one folder of its beds' files")
    return str(folders[0])


def _typed(context: click.Context) -> str:
    """The command as it was typed."""
    words = ["qaroma", "compare"]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) != click.core.ParameterSource.COMMANDLINE or name == "table_only":
            continue
        value = context.params[name]
        if value is True:
            words.append(parameter.opts[-1])
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [parameter.opts[-1], str(one)]
    return " ".join(map(quoted, words))
