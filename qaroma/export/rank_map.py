"""The ranks of an adapter as a picture: one row a layer, one column a kind of module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

_NAME = re.compile(r"(?:.*?\.)?(?P<layer>\d+)\.(?P<module>.+)")
_WIDTH, _HEIGHT, _LEFT, _TOP = 64, 20, 56, 34
_COOL, _WARM = (230, 238, 246), (180, 60, 20)


def rank_map_svg(ranks: Mapping[str, int]) -> str:
    """An SVG of the rank of every module.

    Args:
        ranks: rank of each module by its full name, in the model's order.
    """
    cells: dict[tuple[str, str], list[int]] = {}
    for name, rank in ranks.items():
        match = _NAME.fullmatch(name)
        key = (match["layer"], match["module"]) if match else ("", name)
        cells.setdefault(key, []).append(rank)
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    modules = list(dict.fromkeys(module for _, module in cells))
    largest = max(1, *ranks.values())
    parts = []
    for column, module in enumerate(modules):
        label = escape(module.rpartition(".")[2].removesuffix("_proj"))
        parts.append(f'<text x="{_LEFT + _WIDTH * (column + 0.5)}" y="{_TOP - 8}">{label}</text>')
    for row, layer in enumerate(layers):
        y = _TOP + _HEIGHT * row
        parts.append(f'<text x="{_LEFT / 2}" y="{y + 14}">{escape(layer)}</text>')
        for column, module in enumerate(modules):
            values = cells.get((layer, module))
            if values:
                parts.append(_cell(_LEFT + _WIDTH * column, y, values, largest))
    width, height = _LEFT + _WIDTH * len(modules) + 8, _TOP + _HEIGHT * len(layers) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">'
        f"<title>Rank by layer and module</title>{''.join(parts)}</svg>\n"
    )


def _cell(x: float, y: float, values: list[int], largest: int) -> str:
    """One rectangle with its rank, or with the smallest and largest where modules share it (experts)."""
    low, high = min(values), max(values)
    share = high / largest
    mixed = (round(cool + (warm - cool) * share) for cool, warm in zip(_COOL, _WARM, strict=True))
    colour = "#" + "".join(f"{value:02x}" for value in mixed)
    text = f"{low}" if low == high else f"{low}-{high}"
    ink = "#ffffff" if share > 0.5 else "#202020"
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{colour}"/>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 14}" fill="{ink}">{text}</text>'
    )
