"""``qaroma evaluate``."""

from __future__ import annotations

from typing import Any

import click

from qaroma.cli.options import config_option
from qaroma.cli.output import JSON_OPTION, figures_only, write_figures
from qaroma.cli.run_arguments import TRUST_OPTION
from qaroma.config.load import parse_source
from qaroma.data.sources import require_source
from qaroma.errors import QaromaError
from qaroma.runs.directory import adapter_folder

_EPILOG = """\b
Examples:
  qaroma evaluate runs/quickstart --data demo:calendar-test
  qaroma evaluate runs/mine --data test.jsonl --rows 200 --json
  qaroma evaluate runs/mine --benchmark commonsense --data LLM-Adapters/dataset
  qaroma evaluate --base smollm2-135m --benchmark commonsense --data LLM-Adapters/dataset --scorer likelihood
"""

# What each way of use does not take, by parameter name.
_OF_BENCHMARKS = {
    "tasks": "--tasks",
    "scorer": "--scorer",
    "batch_size": "--batch-size",
    "output": "--output",
    "model__quantization": "--quantization",
}
_OF_DATA = {"data__format": "--data-format", "data__skip_bad_rows": "--skip-bad-rows"}


@click.command(epilog=_EPILOG)
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--data", required=True, multiple=True, metavar="PATH[:WEIGHT]",
              help="File, folder or hub id whose answers are known. Repeatable. With --benchmark: the folder of its "
              "test sets.")  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1), metavar="INTEGER",
              help="At most so many of its rows (with --benchmark: of each task); default: all.")  # fmt: skip
@config_option("data.format")
@config_option("data.skip_bad_rows")
@config_option("evaluation.max_new_tokens", text="Longest answer; default: follows the longest expected one, 32 with "
               "--benchmark.")  # fmt: skip
@click.option("--benchmark", type=click.Choice(["commonsense"]),
              help="Score on a public benchmark, resumably: commonsense is LLM-Adapters' eight tasks.")  # fmt: skip
@click.option("--tasks", metavar="NAME,NAME", help="Some of the benchmark's tasks, as boolq,piqa; default: all.")
@click.option("--scorer", type=click.Choice(["generation", "likelihood"]), default="generation", show_default=True,
              help="generation: the answer is found in greedy text, as in the paper; likelihood: the most probable of "
              "the possible answers, whatever the model would write.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, metavar="INTEGER",
              help="Questions of a benchmark in one forward pass.")  # fmt: skip
@click.option("--output", metavar="PATH", help="Folder of a benchmark's scores and results, or a .json file for the "
              "results; default: RUN/benchmarks/..., or ./benchmarks/... without a run.")  # fmt: skip
@click.option("--base", metavar="MODEL", help="Base model, where it is no longer found under the name that the run "
              "remembers; without RUN and with --benchmark: the untuned model to score.")  # fmt: skip
@TRUST_OPTION
@config_option("model.quantization", text="4-bit data type of the untuned model of --base, or none.")
@config_option("training.device", text="Where to compute.")
@JSON_OPTION
def command(
    run: str | None,
    data: tuple[str, ...],
    rows: int | None,
    benchmark: str | None,
    base: str | None,
    json_output: bool,
    **parameters: Any,
) -> None:
    """Score the fine-tuned model of RUN, a run directory or an adapter folder, on a data set or a benchmark.

    On a data set it prints loss and perplexity of the answers, and the share of them that greedy
    generation reproduces exactly. On a benchmark it prints the accuracy of each task; called again,
    it goes on where it was interrupted.
    """
    if benchmark is not None:
        _check_benchmark(run, data, base, parameters["scorer"])
        _score_benchmark(run, data[0], rows, base, json_output, parameters)
        return
    typed = _typed(_OF_BENCHMARKS)
    if typed:
        raise QaromaError(f"got {', '.join(typed)} without a benchmark; add --benchmark commonsense, or leave it out")
    if run is None:
        raise QaromaError(
            "got no RUN; expected a run directory such as runs/NAME. An untuned model can be scored on a benchmark: "
            "qaroma evaluate --base MODEL --benchmark commonsense --data LLM-Adapters/dataset"
        )
    adapter_folder(run)
    sources = [parse_source(text) for text in data]
    for path, _ in sources:
        require_source(path)

    from qaroma.inference.open import evaluate_run

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
            trust_remote_code=parameters["trust_remote_code"],
        )
        if json_output:
            write(figures)
            return
    write_figures(figures)


def _typed(names: dict[str, str]) -> list[str]:
    """Those of some options that stand on the command line."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return [option for name, option in names.items() if context.get_parameter_source(name) == typed]


def _check_benchmark(run: str | None, data: tuple[str, ...], base: str | None, scorer: str) -> None:
    """Refuse what contradicts itself, before torch is imported."""
    if run is None and base is None:
        raise QaromaError("got neither RUN nor --base; expected a run directory such as runs/NAME, or --base MODEL")
    if len(data) > 1:
        raise QaromaError(f"got --data {len(data)} times; a benchmark's test sets lie in one folder: give that one")
    typed = _typed(_OF_DATA)
    if typed:
        raise QaromaError(f"got {', '.join(typed)} with --benchmark, whose records have one form; leave it out")
    if run is not None and _typed({"model__quantization": ""}):
        raise QaromaError("got --quantization with RUN, which remembers how its base was quantised; leave it out")
    if scorer == "likelihood" and _typed({"evaluation__max_new_tokens": ""}):
        raise QaromaError("got --max-new-tokens with --scorer likelihood, which generates nothing; leave it out")


def _score_benchmark(
    run: str | None, data: str, rows: int | None, base: str | None, json_output: bool, parameters: dict[str, Any]
) -> None:
    from rich.console import Console

    from qaroma.benchmarks.commonsense import chosen_tasks
    from qaroma.benchmarks.commonsense_run import run_commonsense
    from qaroma.benchmarks.results import results_table

    tasks = chosen_tasks(parameters["tasks"])
    with figures_only(json_output) as write:
        try:
            figures = run_commonsense(
                data,
                run=run,
                base=base,
                quantization=parameters["model__quantization"] or "nf4",
                tasks=tasks,
                scorer=parameters["scorer"],
                rows=rows,
                batch_size=parameters["batch_size"],
                max_new_tokens=parameters["evaluation__max_new_tokens"],
                device=parameters["training__device"] or "auto",
                output=parameters["output"],
                trust_remote_code=parameters["trust_remote_code"],
            )
        except KeyboardInterrupt:
            click.echo("\nthe scores so far are kept; type the same command to go on", err=True)
            raise
        if json_output:
            write(figures)
            return
    console = Console()
    console.print(results_table(figures))
    console.print(f"results: {figures['output']}", highlight=False, soft_wrap=True)
