"""The tables of a sheet, in Markdown, from the figures of its cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qaroma.config.words import memory_size

Figures = dict[str, Any]


def sheet_table(model: str, cells: Sequence[Figures]) -> str:
    """Every table of a sheet.

    Args:
        model: as it was named.
        cells: what :func:`qaroma.bench.sheet.fill_sheet` wrote of each.
    """
    kinds = ("level", "card", "longest", "frozen", "growth")
    by_kind = {kind: [cell for cell in cells if cell["kind"] == kind] for kind in kinds}
    lines = [f"{model}, random weights, one sequence a step, on {cells[0]['device'] if cells else 'no device'}.", ""]
    lines += _table(("level", "tokens", "tokens/s", "PEFT", "card busy, s", "PEFT", "peak", "planned", "reserved",
                     "PEFT's peak"), map(_level_row, by_kind["level"]))  # fmt: skip
    lines += _table(("emulated card", "tokens", "level", "", "peak", "planned"), map(_card_row, by_kind["card"]))
    lines += _table(("emulated card", "longest context", "level", "", "peak", "planned"),
                    map(_card_row, by_kind["longest"]))  # fmt: skip
    for cell in by_kind["frozen"]:
        rates = {name: rate["median"] for name, rate in cell.get("tokens_per_second", {}).items()}
        said = ", ".join(f"{rate:,.0f} tokens/s with {name}" for name, rate in rates.items())
        lines.append(f"Frozen ranks: {said or cell['outcome']}.")
    for cell in by_kind["growth"]:
        lines.append(f"Growth's share of a step: {100 * cell['share']:.2g} %." if "share" in cell else cell["outcome"])
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    written = [head, ("---",) * len(head), *rows]
    return [*(f"| {' | '.join(row)} |" for row in written), ""]


def _level_row(cell: Figures) -> tuple[str, ...]:
    place = str(cell["level"]), f"{cell['length']:,}"
    if cell["outcome"] != "ran":
        return *place, cell["outcome"], "-", "-", "-", "-", memory_size(cell["planned"]), "-", "-"
    rates = cell["tokens_per_second"]
    ours, theirs = (f"{rates[name]['median']:,.0f}" if name in rates else "-" for name in ("qaroma", "peft"))
    busy = (f"{cell['busy'][name]:.3f}" if name in cell.get("busy", {}) else "-" for name in ("qaroma", "peft"))
    sizes = [memory_size(cell[key]) if key in cell else "-" for key in ("peak", "planned", "reserved", "peft_peak")]
    if cell.get("beyond"):
        sizes[0] += ", more than planned"
    return *place, ours, theirs, *busy, *sizes


def _card_row(cell: Figures) -> tuple[str, ...]:
    peak = memory_size(cell["peak"]) if "peak" in cell else "-"
    place = f"{cell['gib']} GiB", f"{cell['length']:,}", str(cell["level"])
    return *place, cell["outcome"], peak, memory_size(cell["planned"])
