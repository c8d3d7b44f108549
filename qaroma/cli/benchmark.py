"""``qaroma benchmark``."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from qaroma.cli.options import config_option, count
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.cli.run_arguments import TRUST_OPTION
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.runs.directory import adapter_folder
from qaroma.text.paths import local_path

_EPILOG = """\b
Examples:
  qaroma benchmark runs/mine --tasks commonsense --data LLM-Adapters/dataset
  qaroma benchmark runs/mine --tasks hellaswag,gsm8k --rows 200
  qaroma benchmark --base smollm2-135m --tasks commonsense_likelihood_boolq --data LLM-Adapters/dataset
"""


@click.command(epilog=_EPILOG)
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--tasks", required=True, metavar="NAME,NAME", help="Tasks and groups of lm-evaluation-harness, as "
              "hellaswag,gsm8k (lm-eval ls tasks lists them; their records come from the hub, which has not been tried "
              "yet), or the eight of LLM-Adapters: commonsense (the answer is found in greedy text, as in the paper), "
              "commonsense_likelihood (the most probable of the possible answers), commonsense_boolq, ...")  # fmt: skip
@click.option("--data", metavar="FOLDER", help="LLM-Adapters' dataset folder, for the commonsense tasks.")
@click.option("--rows", type=count(1), metavar="INTEGER", help="At most so many questions of each task; "
              "default: all.")  # fmt: skip
@click.option("--examples", type=count(0), metavar="INTEGER", help="Solved questions before each one; "
              "default: as many as the task says.")  # fmt: skip
@click.option("--no-template", is_flag=True, help="Give the tasks' prompts as they are, not in the chat template that "
              "the model was trained with.")  # fmt: skip
@config_option("evaluation.max_new_tokens", text="Longest generated answer; default: what the task says.")
@click.option("--batch-size", type=count(1), default=16, show_default=True, metavar="INTEGER",
              help="Requests in one forward pass.")  # fmt: skip
@click.option("--output", metavar="PATH", help="Folder of answers and results, or a .json file for the results; "
              "default: RUN/benchmarks, or ./benchmarks/MODEL without a run.")  # fmt: skip
@click.option("--base", metavar="MODEL", help="Base model, where it is no longer found under the name that the run "
              "remembers; without RUN: the untuned model to score.")  # fmt: skip
@config_option("model.quantization", text="4-bit data type of the untuned model of --base, or none.")
@TRUST_OPTION
@config_option("training.device", text="Where to compute.")
@JSON_OPTION
def command(
    run: str | None,
    tasks: str,
    base: str | None,
    no_template: bool,
    json_output: bool,
    **parameters: Any,
) -> None:
    """Score the fine-tuned model of RUN, a run directory or an adapter folder, on public benchmarks.

    It prints each task's metrics with their 95 % intervals. Called again, it goes on where it was
    interrupted: every answer is kept. Needs the extra bench: pip install "qaroma[bench]".
    """
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    _check(run, names, base, parameters)

    from rich.console import Console

    from qaroma.benchmarks.harness import run_benchmark
    from qaroma.benchmarks.results import results_table

    with figures_only(json_output) as write:
        try:
            figures = run_benchmark(
                names,
                run=run,
                base=base,
                quantization=parameters["model__quantization"] or "nf4",
                data=parameters["data"],
                rows=parameters["rows"],
                examples=parameters["examples"],
                template=not no_template,
                max_new_tokens=parameters["evaluation__max_new_tokens"],
                batch_size=parameters["batch_size"],
                device=parameters["training__device"] or "auto",
                output=parameters["output"],
                trust_remote_code=parameters["trust_remote_code"],
            )
        except KeyboardInterrupt:
            click.echo("\nthe answers so far are kept; type the same command to go on", err=True)
            raise
        if json_output:
            write(figures)
            return
    console = Console()
    console.print(results_table(figures))
    console.print(f"results: {figures['output']}", highlight=False, soft_wrap=True)


def _check(run: str | None, names: list[str], base: str | None, parameters: dict[str, Any]) -> None:
    """Refuse what cannot be scored, before torch is imported."""
    if run is None and base is None:
        raise QaromaError("got neither RUN nor --base; expected a run directory such as runs/NAME, or --base MODEL")
    if run is not None and parameters["model__quantization"] is not None:
        raise QaromaError("got --quantization with RUN, which remembers how its base was quantised; leave it out")
    if not names:
        raise QaromaError("got no name in --tasks; expected some, as commonsense or hellaswag,gsm8k")
    if parameters["data"] is None and any(name.startswith("commonsense") for name in names):
        raise QaromaError(
            "the commonsense tasks need LLM-Adapters' test sets; get them with: "
            "git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters/dataset"
        )
    if parameters["data"] is not None and not local_path(parameters["data"]).is_dir():
        raise QaromaError(f"there is no folder '{parameters['data']}'; expected LLM-Adapters' test sets")
    if importlib.util.find_spec("lm_eval") is None:
        raise QaromaError('benchmarks need lm-evaluation-harness; type: pip install "qaroma[bench]"')
    if run is not None:
        adapter_folder(run)
    elif base is not None:
        require_model(base)
