"""``qaroma doctor``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qaroma.cli.options import count
from qaroma.cli.output import JSON_OPTION, figures_only

if TYPE_CHECKING:
    from qaroma.doctor.checks import Finding

_EPILOG = """\b
Examples:
  qaroma doctor
  qaroma doctor --gpus 2
  qaroma doctor --json
"""
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command(epilog=_EPILOG)
@click.option("--gpus", type=count(1), metavar="INTEGER",
              help="Look for as many GPUs, and at what joins them. Default: those that are there.")  # fmt: skip
@JSON_OPTION
@click.pass_context
def command(context: click.Context, gpus: int | None, json_output: bool) -> None:
    """Look at this machine: what a run needs of it, and what to do where that is missing.

    bitsandbytes really quantises and multiplies, attention really runs. The exit code is 1 where
    something would stop a run, else 0; notes do not count.
    """
    from qaroma.doctor.machine import examine

    start = time.perf_counter()
    with figures_only(json_output) as write:
        findings = examine(gpus)
        healthy = all(finding.level != "problem" for finding in findings)
        seconds = time.perf_counter() - start
        if json_output:
            write({"ok": healthy, "seconds": seconds, "checks": [asdict(finding) for finding in findings]})
    if not json_output:
        _print(findings, seconds)
    if not healthy:
        context.exit(1)


def _print(findings: list[Finding], seconds: float) -> None:
    """A line for each thing, with what to do about it on the next where there is something."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        level = click.style(f"{finding.level:<7}", fg=_COLOURS[finding.level])
        click.echo(f"{level}  {finding.name:<{width}}  {finding.found}")
        if finding.advice:
            click.echo(f"{'':<7}  {'':<{width}}  -> {finding.advice}")
    problems = sum(finding.level == "problem" for finding in findings)
    click.echo(f"{problems} problem{'' if problems == 1 else 's'}, looked at in {seconds:.1f} s")
