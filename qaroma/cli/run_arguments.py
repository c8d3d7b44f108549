"""Arguments that every command on a finished run takes."""

from __future__ import annotations

import click

RUN_ARGUMENT = click.argument("run", metavar="RUN")
BASE_OPTION = click.option(
    "--base", metavar="MODEL", help="Base model, where it is no longer found under the name that the run remembers."
)
TRUST_OPTION = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the base; a run that was trained so "
    "needs it typed each time.",
)  # fmt: skip
