"""``qaroma page``."""

from __future__ import annotations

import importlib.util
import webbrowser

import click

from qaroma.cli.options import count
from qaroma.errors import QaromaError

_NEEDED = ("starlette", "uvicorn")
_EPILOG = """\b
Examples:
  qaroma page
  qaroma page --port 8080 --no-browser
"""


@click.command(epilog=_EPILOG)
@click.option("--port", type=count(0, 65535), default=0, metavar="INTEGER",
              help="Port on 127.0.0.1.  [default: one that is free]")  # fmt: skip
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open it in a browser.")
def command(port: int, browser: bool) -> None:
    """Open a page in a browser that does what the commands do, for this machine alone.

    From a file to a tuned model, its chat and its export; every command that the page runs stands there too. Runs lie
    in runs, as always, and what is dropped on the page in qaroma-page/data. A run goes on when the page is closed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise QaromaError(f"the page needs {' and '.join(missing)}; type: pip install 'qaroma[page]'")

    from qaroma.page.server import serve

    def tell(address: str) -> None:
        click.echo(f"open {address}\nIt is for you alone: whoever has this address can use it. Ctrl-C closes the page.")
        if browser:
            webbrowser.open(address)

    click.echo("looking at this machine", err=True)
    try:
        serve(port, tell)
    except KeyboardInterrupt:
        click.echo("closed; a run that is at work goes on (qaroma runs lists it)", err=True)
