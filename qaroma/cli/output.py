"""What commands write: figures as one JSON object, or as lines for people."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from qaroma.config.metrics import METRICS

JSON_OPTION = click.option(
    "--json", "json_output", is_flag=True, help="Only the figures go to stdout, as one JSON object; the rest to stderr."
)


@contextlib.contextmanager
def figures_only(json_output: bool) -> Iterator[Callable[[Any], None]]:
    """Keeps stdout free for the figures.

    Args:
        json_output: whether ``--json`` was typed. If so, whatever the block (or a library that it
            calls) prints goes to stderr.

    Yields:
        A function that writes its argument to the real stdout as JSON.
    """
    stdout = sys.stdout

    def write(figures: Any) -> None:
        stdout.write(json.dumps(_finite(figures), ensure_ascii=False, allow_nan=False) + "\n")
        stdout.flush()

    with contextlib.redirect_stdout(sys.stderr) if json_output else contextlib.nullcontext():
        yield write


def write_figures(figures: Mapping[str, Any]) -> None:
    """Writes figures to stdout, a name and a value a line."""
    width = max((len(name) for name in figures), default=0)
    for name, value in figures.items():
        shown = _number(name, value) if isinstance(value, float) else value
        click.echo(f"{name.replace('_', ' '):<{width}}  {shown}")


def _number(name: str, value: float) -> str:
    """A figure as its metric is printed everywhere; one that is no metric with six digits."""
    known = METRICS.get(name)
    return known.text(value) if known and known.percent else f"{value:.6g}"


def _finite(value: Any) -> Any:
    """The same value with null for infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
