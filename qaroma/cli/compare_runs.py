"""``qaroma compare-runs``."""

from __future__ import annotations

import click

from qaroma.cli.options import count
from qaroma.cli.output import JSON_OPTION, figures_only

_EPILOG = """\b
Examples:
  qaroma compare-runs runs/demo runs/mine
  qaroma compare-runs runs/* --json
"""


@click.command(epilog=_EPILOG)
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option("--answers", type=count(0), default=5, show_default=True, metavar="INTEGER",
              help="Prompts whose answers are shown, those answered differently first.")  # fmt: skip
@JSON_OPTION
def command(runs: tuple[str, ...], answers: int, json_output: bool) -> None:
    """Put runs side by side: the settings that differ, their figures, and their answers to the same prompts.

    Nothing is computed again: everything is read from the run directories.
    """
    from qaroma.report.run_table import table_console
    from qaroma.report.side_by_side import compare_runs, print_side_by_side

    with figures_only(json_output) as write:
        compared = compare_runs(runs)
        if json_output:
            write(compared.to_json())
            return
    print_side_by_side(compared, table_console(), answers=answers)
