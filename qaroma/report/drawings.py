"""The figures, drawn: line panels, rank maps, component cosines. All return matplotlib figures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qaroma.report.names import module_labels
from qaroma.report.panels import Panel
from qaroma.report.rank_map import INKS, SHADES, RankMap, rank_map
from qaroma.report.spectra import Spectra
from qaroma.report.style import DASHES, INK, PALETTE, PAPER, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

# Everything is placed by these inches: matplotlib's layout engines draw each figure twice, which
# a page that is written at every validation cannot afford.
_PANEL, _PANEL_MARGINS = (4.4, 3.0), (0.62, 0.26, 0.62, 0.4)  # width, height; left, right, bottom, top
_CELL = (0.46, 0.2)
_SQUARE, _SQUARE_MARGINS = 1.95, (0.45, 0.4, 0.5, 0.5)
_LETTER = 0.075
_CLOCK = ((1, "s"), (60, "min"), (3600, "h"))
_MOST_INSIDE, _MOST_LABELS, _NAME = 3, 8, 0.2
_MOST_NUMBERED = 8


def panel_figure(panel: Panel, size: tuple[float, float]) -> Figure:
    """One panel alone, so many inches wide and high; many names make it higher. The page says its title above it."""
    from matplotlib.figure import Figure

    (width, height), (left, right, bottom, _) = size, _PANEL_MARGINS
    names = _NAME * panel.names if panel.names > _MOST_INSIDE else 0
    with styled():
        figure = Figure(figsize=(width, height + names))
        axes = add_axes(figure, left, bottom, width - left - right, height - bottom - right)
        draw_panel(axes, replace(panel, title=""), names_above=names > 0)
    return figure


def panels_figure(panels: Sequence[Panel], columns: int = 2) -> Figure:
    """Panels beside and below each other."""
    from matplotlib.figure import Figure

    columns, (width, height) = min(columns, len(panels)), _PANEL
    rows = math.ceil(len(panels) / columns)
    with styled():
        figure = Figure(figsize=(width * columns, height * rows))
        left, right, bottom, top = _PANEL_MARGINS
        for place, panel in enumerate(panels):
            row, column = divmod(place, columns)
            corner = width * column + left, height * (rows - 1 - row) + bottom
            draw_panel(add_axes(figure, *corner, width - left - right, height - bottom - top), panel)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at so many inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def draw_panel(axes: Axes, panel: Panel, *, names_above: bool = False) -> None:
    """Lines, scales, the mark of what was kept, and the names that lines have, above the axes or within them."""
    axes.set_title(panel.title)
    for place, line in enumerate(panel.lines):
        # Lines that lie on each other stay visible: the later ones are thinner.
        width = min(1.7 + 0.5 * (len(panel.lines) - 1 - place), 4.2)
        axes.plot(
            line.series.steps,
            line.series.values,
            label=line.label or "_",
            color=PALETTE[line.colour % len(PALETTE)],
            linestyle="-" if line.pale else DASHES[line.style],
            linewidth=0.8 if line.pale else width,
            alpha=0.35 if line.pale else 1.0,
            drawstyle="steps-post" if panel.steps else "default",
            marker="o" if line.marked and len(line.series) <= 60 else None,
            markersize=4,
        )
    if panel.kept:
        _mark(axes, *panel.kept)
    _set_scales(axes, panel)
    labels = panel.names
    if names_above:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    elif labels:
        axes.legend(loc="best", ncols=1 if labels <= _MOST_LABELS else 2)


def _mark(axes: Axes, step: int, value: float) -> None:
    """The point that was kept: a ring, and a line down to its step."""
    axes.axvline(step, color=INK, linewidth=0.9, linestyle=DASHES[2], zorder=1)
    label = f"kept: step {step:,}"
    axes.plot([step], [value], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
              label=label)  # fmt: skip


def _set_scales(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    last = max(panel.last, 1)
    axes.set_xlim(-0.02 * last, 1.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _when(panel, step)))
    axes.set_xlabel("step, and time of training" if len(panel.seconds) else "step")
    if panel.logarithmic:
        values = [value for line in panel.lines for value in line.series.values]
        axes.set_yscale("log")
        few = max(values) / min(values) < 2e3
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.key in ("rank", "modules"):
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    plain = FuncFormatter(lambda value, _: f"{value:.4g}")
    axes.yaxis.set_major_formatter(EngFormatter(sep=" ") if panel.key == "trainable" else plain)
    if panel.from_zero:
        axes.set_ylim(bottom=0)


def _when(panel: Panel, step: float) -> str:
    """A tick's step, and below it the time that training took to it."""
    done = bisect_right(panel.seconds.steps, step)
    if not done:
        return f"{step:,.0f}"
    size, unit = next(((s, u) for s, u in _CLOCK if panel.seconds.values[-1] < 100 * s), _CLOCK[-1])
    time = panel.seconds.values[done - 1] / size
    return f"{step:,.0f}\n{time:{'.0f' if time >= 10 else '.2g'}} {unit}"


def rank_figure(spectra: Spectra) -> Figure:
    """The paper's Figures 3 and 5: rank beside effective rank, layer x module, in one scale."""
    from matplotlib.figure import Figure

    largest = max(spectra.ranks.values(), default=0)
    ratio = "" if spectra.ratio is None else f": {100 * spectra.ratio:.1f} % of the rank"
    titles = ("Rank", f"Effective rank{ratio}")
    maps = [rank_map(values, scale=largest) for values in (spectra.ranks, spectra.effective)]
    wide, high = max(_CELL[0] * len(maps[0].kinds), 2.4), _CELL[1] * len(maps[0].layers)
    left = 0.45 + _LETTER * max(len(label) for label, _ in maps[0].layers)
    bottom = 0.25 + 0.055 * max(map(len, maps[0].kinds))
    width = left + wide + 0.15
    with styled():
        figure = Figure(figsize=(width * len(maps), bottom + high + 0.4))
        for place, (title, found) in enumerate(zip(titles, maps, strict=True)):
            axes = add_axes(figure, width * place + left, bottom, wide, high)
            axes.set_title(title)
            draw_map(axes, found, size=7.5)
            axes.set_ylabel("layer" if len(found.layers) > 1 else "")
    return figure


def draw_map(axes: Axes, found: RankMap, *, size: float, across: bool = False, numbered: bool = True) -> None:
    """One map in the shades of the page, layers down or across.

    Args:
        axes: where.
        found: the map.
        size: of its letters, in points.
        across: whether a layer is a column.
        numbered: whether each cell says its value.
    """
    from matplotlib.colors import ListedColormap

    layers, rows = [label for label, _ in found.layers], [cells for _, cells in found.layers]
    grid = list(zip(*rows, strict=True)) if across else rows
    shades = [[math.nan if cell is None else cell.shade for cell in row] for row in grid]
    colours = ListedColormap(SHADES)
    mesh = axes.pcolormesh(shades, cmap=colours, vmin=0, vmax=len(SHADES) - 1, edgecolors=PAPER, linewidth=0.8)
    mesh.set_rasterized(False)
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            if cell is not None and numbered:
                _write_in_cell(axes, x, y, cell.text, INKS[cell.shade], size)
    names = {"x": layers if across else found.kinds, "y": found.kinds if across else layers}
    turned: dict[str, Any] = {} if across else {"rotation": 40, "ha": "right"}
    every = 1 if numbered else 10
    axes.set_xticks([x + 0.5 for x in range(len(names["x"]))][::every], names["x"][::every], **turned)
    axes.set_yticks([y + 0.5 for y in range(len(names["y"]))], names["y"])
    axes.tick_params(labelsize=size)
    axes.grid(False)
    axes.invert_yaxis()
    _without_frame(axes)


def cosine_figure(similarity: Mapping[str, Mapping[str, Tensor]], modules: Sequence[str]) -> Figure:
    """The paper's Figure 4: cosines between the components of modules, one row of maps a run.

    Args:
        similarity: title of a run -> module -> cosines (P, P).
        modules: full names of all modules of the model, for short labels.
    """
    from matplotlib.figure import Figure

    shown = list(dict.fromkeys(module for found in similarity.values() for module in found))
    labels = dict(zip(shown, module_labels(shown, modules), strict=True))
    several = len(similarity) > 1
    # With several runs a column is a run, so that a module's maps stand side by side.
    columns = len(similarity) if several else min(2, len(shown))
    rows = len(shown) if several else math.ceil(len(shown) / columns)
    left, right, bottom, top = _SQUARE_MARGINS
    width, height = left + _SQUARE + right, bottom + _SQUARE + top
    scale = any(_too_many(found) for found in similarity.values())
    with styled():
        figure = Figure(figsize=(width * columns + 0.4 * scale, height * rows))
        mesh: Any = None
        for column, (run, found) in enumerate(similarity.items()):
            for row, module in enumerate(shown):
                if module not in found:
                    continue
                place = row * columns + column if several else row
                down, across = divmod(place, columns)
                corner = width * across + left, height * (rows - 1 - down) + bottom
                axes = add_axes(figure, *corner, _SQUARE, _SQUARE)
                mesh = _draw_cosines(axes, found[module], f"{labels[module]}\n{run}" if several else labels[module])
        if scale:
            beside = add_axes(figure, width * columns - 0.2, height * (rows - 1) + bottom, 0.09, _SQUARE)
            bar = figure.colorbar(mesh, cax=beside, ticks=[-1, 0, 1])
            bar.outline.set_visible(False)
            if bar.solids is not None:
                bar.solids.set_rasterized(False)
    return figure


def _draw_cosines(axes: Axes, cosines: Tensor, title: str) -> Any:
    import matplotlib

    values = cosines.tolist()
    count = len(values)
    axes.set_title(title, fontsize=8.5)
    axes.grid(False)
    colours = matplotlib.colormaps["RdBu_r"].resampled(41)
    mesh = axes.pcolormesh(values, cmap=colours, vmin=-1, vmax=1, edgecolors=PAPER, linewidth=0.8)
    if count <= _MOST_NUMBERED:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                ink = "#ffffff" if abs(value) > 0.6 else "#111111"
                _write_in_cell(axes, x, y, f"{value:.2f}".replace("-0.00", "0.00"), ink, 6.5)
    ticks = sorted({0, count - 1} | set(range(0, count, max(1, count // 5))))
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick + 1) for tick in ticks])
    axes.set_yticks([tick + 0.5 for tick in ticks], [str(tick + 1) for tick in ticks])
    axes.set_xlabel("component")
    axes.set_aspect("equal")
    axes.invert_yaxis()
    _without_frame(axes)
    return mesh


def _too_many(similarity: Mapping[str, Tensor]) -> bool:
    """Whether a map has too many cells for numbers, and needs a scale of colours."""
    return any(len(cosines) > _MOST_NUMBERED for cosines in similarity.values())


def _write_in_cell(axes: Axes, x: int, y: int, text: str, ink: str, size: float) -> None:
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color=ink)


def _without_frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
