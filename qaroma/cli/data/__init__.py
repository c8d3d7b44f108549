"""``qaroma data``: commands that look at data and train nothing."""

from __future__ import annotations

import click

from qaroma.cli.lazy import LazyGroup

COMMANDS = {
    "preview": "Show examples as the model sees them, the trained tokens marked.",
}


@click.group(cls=LazyGroup, package="qaroma.cli.data", commands_help=COMMANDS)
def command() -> None:
    """Look at data as training sees it."""
