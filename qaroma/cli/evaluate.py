"""``qaroma evaluate``."""

from __future__ import annotations

from typing import Any

import click

from qaroma.cli.options import config_option, count, read_config
from qaroma.cli.output import JSON_OPTION, figures_only, write_figures
from qaroma.cli.run_arguments import BASE_OPTION, RUN_ARGUMENT, TRUST_OPTION
from qaroma.config.load import parse_source
from qaroma.data.sources import require_source
from qaroma.errors import QaromaError
from qaroma.runs.directory import adapter_folder

_EPILOG = """\b
Examples:
  qaroma evaluate runs/demo --data demo:calendar-test
  qaroma evaluate runs/mine --data test.jsonl --rows 200 --json
"""


def _refuse_benchmark(_: click.Context, __: click.Parameter, value: str | None) -> None:
    """Names the command that benchmarks moved to."""
    if value is not None:
        raise QaromaError(
            "benchmarks have their own command: qaroma benchmark RUN --tasks commonsense --data LLM-Adapters/dataset "
            "(or --tasks commonsense_likelihood)"
        )


@click.command(epilog=_EPILOG)
@RUN_ARGUMENT
@click.option("--data", required=True, multiple=True, metavar="PATH[:WEIGHT]",
              help="File, folder or hub id whose answers are known. Repeatable.")  # fmt: skip
@click.option("--rows", type=count(1), metavar="INTEGER", help="At most so many of its rows; default: all.")
@config_option("data.format")
@config_option("data.columns")
@config_option("data.feedback")
@config_option("data.skip_bad_rows")
@config_option("evaluation.max_new_tokens", text="Longest answer; default: follows the longest expected one.")
@BASE_OPTION
@TRUST_OPTION
@config_option("training.device", text="Where to compute.")
@click.option("--benchmark", "--tasks", "--scorer", hidden=True, expose_value=False, is_eager=True,
              callback=_refuse_benchmark, help="Moved to qaroma benchmark.")  # fmt: skip
@JSON_OPTION
def command(
    run: str,
    data: tuple[str, ...],
    rows: int | None,
    base: str | None,
    json_output: bool,
    **parameters: Any,
) -> None:
    """Score the fine-tuned model of RUN, a run directory or an adapter folder, on a data set.

    It prints loss and perplexity of the answers, and the share of them that greedy generation
    reproduces exactly; for public benchmarks see qaroma benchmark.
    """
    adapter_folder(run)
    sources = [parse_source(text) for text in data]
    for path, _ in sources:
        require_source(path)
    reading = read_config(None, {key: value for key, value in parameters.items() if key.startswith("data__")}, ()).data

    from qaroma.inference.open import evaluate_run

    with figures_only(json_output) as write:
        figures = evaluate_run(
            run,
            sources,
            data_format=parameters["data__format"] or "auto",
            columns=reading.columns,
            feedback=reading.feedback,
            rows=rows,
            max_new_tokens=parameters["evaluation__max_new_tokens"],
            base=base,
            device=parameters["training__device"] or "auto",
            skip_bad=bool(parameters["data__skip_bad_rows"]),
            trust_remote_code=parameters["trust_remote_code"],
        )
        if json_output:
            write(figures)
            return
    write_figures(figures)
