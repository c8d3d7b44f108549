"""``qaroma configs``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

_LIST_EPILOG = """\b
Examples:
  qaroma configs ls
"""
_COPY_EPILOG = """\b
Examples:
  qaroma configs cp quickstart my-quickstart.yaml
"""
_EPILOG = _LIST_EPILOG + _COPY_EPILOG.split("\n", 2)[2]
_WIDTH = 100


@click.group(epilog=_EPILOG)
def command() -> None:
    """Look at the configurations that come with qaroma, and copy one to change it."""


@command.command("ls", epilog=_LIST_EPILOG)
@click.option("--json", "json_output", is_flag=True, help="The list as one JSON object.")
def ls(json_output: bool) -> None:
    """List them: the name for --config, what the run is, and what it takes, measured or planned."""
    from dataclasses import asdict

    from qaroma.cli.output import figures_only
    from qaroma.config.shipped import list_shipped

    found = list_shipped()
    if json_output:
        with figures_only(True) as write:
            write({"configs": [asdict(one) for one in found]})
        return
    for one in found:
        click.secho(one.name, bold=True)
        for text in (one.title, one.needs):
            click.echo(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  "))


@command.command("cp", epilog=_COPY_EPILOG)
@click.argument("name")
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def cp(name: str, destination: Path | None, force: bool) -> None:
    """Copy the configuration NAME to DESTINATION, a file or a folder; default: this folder."""
    from qaroma.cli.config_file import write_config
    from qaroma.config.shipped import find_shipped

    source = find_shipped(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    write_config(target, source.read_text(encoding="utf-8"), force=force)
    click.echo(f"wrote {target.as_posix()}; type next: qaroma finetune --config {target.as_posix()}")
