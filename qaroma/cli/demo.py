"""``qaroma demo``: a fine-tuning with the configuration ``quickstart``, begun or gone on with."""

from __future__ import annotations

import click

from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.config.load import read_settings
from qaroma.config.shipped import find_shipped
from qaroma.runs.directory import RunDirectory, quoted
from qaroma.runs.reading import read_run
from qaroma.training.checks import check_finetune

_EPILOG = """\b
Examples:
  qaroma demo
  qaroma demo --output runs/demo-2
"""

_BEFORE = """\
A model of 135 million weights, held in 4 bits, learns to turn a request into one exact JSON call. It has never seen
the form of the calls, and is asked what no row of its training says. No GPU is needed; it takes some minutes.
It shows the tool, not the method: the task is easy, and needs no rank that grows.
Ctrl-C stops it, and the same command goes on. All of it is in {folder}.
"""
_AFTER = """
Ask it something:  qaroma generate {run} "Dim the lights in the attic to 35 percent."
With your own data:  qaroma init"""
_DONE = """\
{folder} is finished. Type next: qaroma chat {run}
or begin anew: qaroma demo --output FOLDER"""


@click.command(epilog=_EPILOG)
@click.option("--output", metavar="FOLDER", default="runs/demo", show_default=True, help="Where the run is kept.")
@JSON_OPTION
def command(output: str, json_output: bool) -> None:
    """See a whole run: a small model learns in minutes, on a CPU.

    This is qaroma finetune --config quickstart. Interrupted, the same command goes on; finished, it says what to
    type next.
    """
    settings = read_settings(find_shipped("quickstart"), {"output": output}, [])
    begun = RunDirectory(output).exists()
    check_finetune(settings, resume=begun, typed=())
    words = {"folder": output, "run": quoted(output)}
    run = read_run(output)
    with figures_only(json_output) as write:
        if run.finished:
            figures = dict(run.summary)
            click.echo(_DONE.format(**words), err=True)
        else:
            from qaroma.training.finetune import finetune

            click.echo(_BEFORE.format(**words), err=True)
            figures = finetune(settings, resume=begun)
            click.echo(_AFTER.format(**words), err=True)
        if json_output:
            write(figures)
