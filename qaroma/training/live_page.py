"""The run's own report.html, kept up to date while it trains."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qaroma.report.page import write_page


class LivePage:
    """Writes the page when it is told to; a page that fails never costs a run.

    Args:
        run: the run directory.
        console: where a failure is told, once.
        wanted: False writes nothing.
    """

    def __init__(self, run: Path, console: Console, *, wanted: bool = True) -> None:
        self.run, self.console, self.wanted = run, console, wanted

    def update(self, *, stopped: bool = False) -> None:
        if not self.wanted:
            return
        try:
            write_page(self.run, stopped=stopped)
        except Exception as error:  # whatever drawing raises, training goes on
            self.wanted = False
            self.console.print(f"report.html is not kept up to date: {error}", style="yellow", markup=False)
