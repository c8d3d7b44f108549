"""``qaroma runs``."""

from __future__ import annotations

import click

from qaroma.cli.output import JSON_OPTION, figures_only

_EPILOG = """\b
Examples:
  qaroma runs
  qaroma runs /data/experiments --json
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", metavar="[FOLDER]", default="runs")
@JSON_OPTION
def command(folder: str, json_output: bool) -> None:
    """List the runs in FOLDER, newest first; the default is runs.

    For each: model, data, method, whether it is finished or can go on, its best validation figure,
    the share of exact answers, and the mean rank that grew.
    """
    from qaroma.report.run_table import print_runs, table_console
    from qaroma.runs.figures import as_json
    from qaroma.runs.finding import list_runs

    with figures_only(json_output) as write:
        runs = list_runs(folder)
        if json_output:
            write({"folder": folder, "runs": [as_json(run) for run in runs]})
            return
    print_runs(runs, folder, table_console())
