"""``qaroma evaluate``."""

from __future__ import annotations

from typing import Any

import click

from qaroma.cli.options import config_option
from qaroma.cli.output import JSON_OPTION, figures_only, write_figures
from qaroma.cli.run_options import BASE_OPTION, RUN_ARGUMENT
from qaroma.configfile import parse_source

_EPILOG = """\b
Examples:
  qaroma evaluate runs/quickstart --data demo:calendar-test
  qaroma evaluate runs/mine --data test.jsonl --rows 200 --json
"""


@click.command(epilog=_EPILOG)
@RUN_ARGUMENT
@click.option("--data", required=True, multiple=True, metavar="PATH[:WEIGHT]",
              help="File, folder or hub id whose answers are known. Repeatable.")  # fmt: skip
@click.option(
    "--rows", type=click.IntRange(min=1), metavar="INTEGER", help="At most so many of its rows; default: all."
)
@config_option("data.format")
@config_option("data.skip_bad_rows")
@config_option("evaluation.max_new_tokens")
@BASE_OPTION
@config_option("training.device", text="Where to compute.")
@JSON_OPTION
def command(
    run: str, data: tuple[str, ...], rows: int | None, base: str | None, json_output: bool, **parameters: Any
) -> None:
    """Score the fine-tuned model of RUN, a run directory or an adapter folder, on a data set.

    Prints loss and perplexity of the answers, and the share of them that greedy generation
    reproduces exactly.
    """
    sources = [parse_source(text) for text in data]

    from qaroma.inference import evaluate_run

    with figures_only(json_output) as write:
        figures = evaluate_run(
            run,
            sources,
            data_format=parameters["data__format"] or "auto",
            rows=rows,
            max_new_tokens=parameters["evaluation__max_new_tokens"],
            base=base,
            device=parameters["training__device"] or "auto",
            skip_bad=bool(parameters["data__skip_bad_rows"]),
        )
        if json_output:
            write(figures)
            return
    write_figures(figures)
