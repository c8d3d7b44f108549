"""``qaroma report``."""

from __future__ import annotations

import click

_FORMATS = ("png", "svg", "html")
_EPILOG = """\b
Examples:
  qaroma report runs/demo
  qaroma report runs/demo runs/mine --output figures --format svg
  qaroma report runs/mine --module 3.mlp.up_proj --module 7.mlp.up_proj
"""


def _read_formats(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    formats = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    unknown = [name for name in formats if name not in _FORMATS]
    if unknown or not formats:
        raise click.BadParameter(f"got {', '.join(unknown) or 'nothing'}; expected some of {','.join(_FORMATS)}")
    return formats


@click.command(epilog=_EPILOG)
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True)
@click.option("--output", metavar="FOLDER", help="Where to write; default: RUN/report of one run, ./report of several.")
@click.option("--format", "formats", default="png,svg,html", show_default=True, callback=_read_formats,
              metavar="LIST", help="Of png, svg (the figures; png also an image to share, report.png) and html (one "
              "page that needs no network).")  # fmt: skip
@click.option("--module", "modules", multiple=True, metavar="NAME",
              help="Module, or ending of its name, whose rank and components are shown; default: chosen. "
              "Repeatable.")  # fmt: skip
@click.option("--metric", metavar="NAME", help="Validation metric that is drawn; default: the task's own.")
def command(
    runs: tuple[str, ...], output: str | None, formats: tuple[str, ...], modules: tuple[str, ...], metric: str | None
) -> None:
    """Draw how runs grew and learned: figures, and one HTML page.

    RUN is a run directory, finished or not; several are drawn as lines of the same figures. Figures
    need matplotlib: pip install 'qaroma[report]'.
    """
    from qaroma.report.write import write_report

    report = write_report(runs, output=output, formats=formats, modules=modules, metric=metric)
    for name, (rank, effective, ratio) in report.ratios.items():
        click.echo(f"{name}: effective rank {effective:.2f} of rank {rank:.2f} ({100 * ratio:.1f} %)")
    for sentence in report.missing:
        click.echo(f"left out: {sentence}")
    for file in report.files:
        click.echo(file.as_posix())
