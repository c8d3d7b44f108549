"""``qaroma generate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from qaroma.cli.options import config_option, count
from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.cli.run_arguments import BASE_OPTION, RUN_ARGUMENT, TRUST_OPTION
from qaroma.errors import QaromaError
from qaroma.model.builtin import require_model
from qaroma.runs.directory import adapter_folder

_EPILOG = """\b
Examples:
  qaroma generate runs/demo "Play some Mozart in the attic."
  qaroma generate runs/demo - < prompts.txt
"""


@click.command(epilog=_EPILOG)
@RUN_ARGUMENT
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("--max-new-tokens", type=count(1), default=256, show_default=True, metavar="INTEGER",
              help="Longest answer.")  # fmt: skip
@BASE_OPTION
@TRUST_OPTION
@config_option("training.device", text="Where to compute.")
@JSON_OPTION
def command(
    run: str,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    base: str | None,
    trust_remote_code: bool,
    training__device: str | None,
    json_output: bool,
) -> None:
    """Answer prompts with the fine-tuned model of RUN, a run directory or an adapter folder.

    A PROMPT of - reads prompts from stdin, one a line. Answers are greedy: the same each time.
    """
    adapter_folder(run)
    if base is not None:
        require_model(base)
    asked = _prompts(prompts)

    from qaroma.inference.open import generate_from_run

    with figures_only(json_output) as write:
        answers = generate_from_run(
            run,
            asked,
            max_new_tokens=max_new_tokens,
            base=base,
            device=training__device or "auto",
            trust_remote_code=trust_remote_code,
        )
        if json_output:
            pairs = zip(asked, answers, strict=True)
            write({"answers": [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]})
            return
    for prompt, answer in zip(asked, answers, strict=True):
        if len(asked) > 1:
            click.echo(f"> {prompt}")
        click.echo(answer)


def _prompts(typed: Sequence[str]) -> list[str]:
    prompts: list[str] = []
    for prompt in typed:
        if prompt == "-":
            prompts.extend(line.strip() for line in sys.stdin if line.strip())
        else:
            prompts.append(prompt)
    if not prompts:
        raise QaromaError("got no prompt on stdin; expected one a line")
    return prompts
