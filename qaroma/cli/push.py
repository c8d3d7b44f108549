"""``qaroma push``."""

from __future__ import annotations

import click

from qaroma.cli.output import JSON_OPTION, figures_only
from qaroma.cli.run_arguments import RUN_ARGUMENT
from qaroma.config.words import file_size
from qaroma.runs.directory import adapter_folder

_EPILOG = """\b
Examples:
  qaroma push runs/demo my-calendar --dry-run
  qaroma push runs/demo my-calendar
  qaroma push runs/mine my-org/mine --public --message "Second attempt"
"""


@click.command(epilog=_EPILOG)
@RUN_ARGUMENT
@click.argument("repo_id", metavar="[NAMESPACE/]NAME")
@click.option("--public", is_flag=True, help="Let all see the repository; without it only you can.")
@click.option("--revision", metavar="BRANCH", help="Branch, made where it is missing; default: main.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--include-gguf", is_flag=True, help="Send the exported adapter.gguf too, for llama.cpp.")
@click.option(
    "--dry-run", is_flag=True, help="Only list what would be sent; the hub is not asked, nobody is logged in."
)
@click.option("--base", metavar="NAMESPACE/NAME", help="The base's id on the hub, where the run knows a local folder.")
@JSON_OPTION
def command(
    run: str,
    repo_id: str,
    public: bool,
    revision: str | None,
    message: str | None,
    include_gguf: bool,
    dry_run: bool,
    base: str | None,
    json_output: bool,
) -> None:
    """Send the adapter of RUN to the Hugging Face hub, with a model card.

    A repository that does not exist is made, private unless --public; whether an existing one is
    private is never changed. Sent are the PEFT adapter, growth.json and the card: no checkpoints, no
    metrics, no paths of this machine. Log in first: hf auth login.
    """
    adapter_folder(run)

    from qaroma.export.push import push

    with figures_only(json_output) as write:
        pushed = push(
            run,
            repo_id,
            public=public,
            revision=revision,
            message=message,
            base=base,
            include_gguf=include_gguf,
            dry_run=dry_run,
            say=lambda line: click.echo(line, err=True),
        )
        if json_output:
            write(pushed.to_json())
            return
    if dry_run:
        click.echo(f"would be sent to {pushed.repo_id}, {file_size(pushed.bytes)} in all:")
        for name in pushed.files:
            click.echo(f"  {name}")
        return
    seen = "private" if pushed.private else "public"
    click.echo(f"{pushed.url} ({seen}), {len(pushed.files)} files, {file_size(pushed.bytes)}")
    click.echo("load it in Python, with PEFT:")
    for line in pushed.loading:
        click.echo(f"  {line}")
