"""``qaroma runs``."""

from __future__ import annotations

import sys

import click

from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.config.words import file_size
from qaroma.errors import QaromaError

_LIST_EPILOG = """\b
Examples:
  qaroma runs
  qaroma runs runs/demo --json
"""
_REMOVE_EPILOG = """\b
Examples:
  qaroma runs rm runs/demo
  qaroma runs rm runs/demo runs/mine --yes
"""
_EPILOG = _LIST_EPILOG + _REMOVE_EPILOG.split("\n", 2)[2]


class _ListOrSubcommand(click.Group):
    """A group that lists where the first word names none of its commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with ``ls`` put before a folder and before options of the list."""
        ours = {*self.commands, *ctx.help_option_names}
        return super().parse_args(ctx, args if args and args[0] in ours else ["ls", *args])


@click.group(cls=_ListOrSubcommand, epilog=_EPILOG)
def command() -> None:
    """List the runs in a folder (qaroma runs [FOLDER], the default is runs), or remove old ones."""


@command.command("ls", epilog=_LIST_EPILOG)
@click.argument("folder", metavar="[FOLDER]", default="runs")
@JSON_OPTION
def ls(folder: str, json_output: bool) -> None:
    """List the runs in FOLDER, newest first; the default is runs. The word ls may be left out.

    For each: whether it is finished or can go on, its best validation figure, the share of exact
    answers, and the mean rank that grew; in a wide terminal model, data and method too.
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


@command.command("rm", epilog=_REMOVE_EPILOG)
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(runs: tuple[str, ...], yes: bool) -> None:
    """Remove runs: settings, log, checkpoints, adapters, exports, all that lies in them.

    It asks first. A run that is at work is refused, and so is a folder that is no run or that holds
    anything else; then none is removed.
    """
    from qaroma.report.run_table import state_sentence
    from qaroma.runs.removal import removable, remove_runs

    found = removable(runs)
    for run in found:
        click.echo(f"{run.name}: {state_sentence(run)}, {file_size(run.bytes)}")
    if not yes:
        if not sys.stdin.isatty():
            raise QaromaError("there is nobody to ask whether to remove this; type the same command with --yes")
        click.confirm(f"remove {'it' if len(found) == 1 else f'these {len(found)} runs'} for good?", abort=True)
    remove_runs(found)
    click.echo(f"removed {len(found)} run{'' if len(found) == 1 else 's'}")
