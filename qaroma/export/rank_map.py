"""The ranks of an adapter as a picture: one row a layer, one column a kind of module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from qaroma.report.names import layer_grid
from qaroma.report.rank_map import INKS, SHADES, shade

_WIDTH, _HEIGHT, _LEFT, _TOP, _LETTER = 64, 20, 56, 34, 7


def rank_map_svg(ranks: Mapping[str, int]) -> str:
    """An SVG of the rank of every module.

    Args:
        ranks: rank of each module by its full name, in the model's order.
    """
    grid = layer_grid(ranks)
    largest, even = max(1, *ranks.values()), len(set(ranks.values())) == 1
    left = max(_LEFT, _LETTER * max(map(len, grid.rows), default=0))
    parts = []
    for column, label in enumerate(grid.columns):
        x, text = left + _WIDTH * (column + 0.5), escape(label.removesuffix("_proj"))
        parts.append(f'<text x="{x}" y="{_TOP - 8}">{text}</text>')
    for row, (label, cells) in enumerate(zip(grid.rows, grid.cells, strict=True)):
        y = _TOP + _HEIGHT * row
        parts.append(f'<text x="{left / 2}" y="{y + 14}">{escape(label)}</text>')
        parts += [
            _cell(left + _WIDTH * column, y, cell, largest, even=even) for column, cell in enumerate(cells) if cell
        ]
    width, height = left + _WIDTH * len(grid.columns) + 8, _TOP + _HEIGHT * len(grid.rows) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">'
        f"<title>Rank by layer and module</title>{''.join(parts)}</svg>\n"
    )


def _cell(x: float, y: float, values: Sequence[float], largest: int, *, even: bool) -> str:
    """One rectangle with its rank, or with the smallest and largest where modules share it (experts)."""
    low, high = min(values), max(values)
    place = shade(high, largest, even=even)
    text = f"{low:g}" if low == high else f"{low:g}-{high:g}"
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{SHADES[place]}"/>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 14}" fill="{INKS[place]}">{text}</text>'
    )
