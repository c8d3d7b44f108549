"""The figures, drawn: line panels, rank maps, component cosines. All return matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qaroma.report.names import Grid, layer_grid, module_labels
from qaroma.report.panels import Panel
from qaroma.report.spectra import Spectra
from qaroma.report.style import DASHES, PALETTE, PAPER, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

# Everything is placed by these inches: matplotlib's layout engines draw each figure twice, which
# a page that is written at every validation cannot afford.
_PANEL, _PANEL_MARGINS = (4.4, 2.9), (0.62, 0.14, 0.48, 0.4)  # width, height; left, right, bottom, top
_CELL = (0.46, 0.2)
_SQUARE, _SQUARE_MARGINS = 1.95, (0.45, 0.4, 0.5, 0.5)
_LETTER = 0.075
_MOST_LABELS = 8
_MOST_NUMBERED = 8


def panel_figure(panel: Panel) -> Figure:
    """One panel alone."""
    return panels_figure([panel], columns=1)


def panels_figure(panels: Sequence[Panel], columns: int = 2) -> Figure:
    """Panels beside and below each other."""
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with styled():
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows))
        left, right, bottom, top = _PANEL_MARGINS
        for place, panel in enumerate(panels):
            row, column = divmod(place, columns)
            corner = _PANEL[0] * column + left, _PANEL[1] * (rows - 1 - row) + bottom
            axes = _add_axes(figure, *corner, _PANEL[0] - left - right, _PANEL[1] - bottom - top)
            _draw_panel(axes, panel)
    return figure


def _add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at so many inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("step")
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
            marker="o" if panel.marked and len(line.series) <= 60 else None,
            markersize=4,
        )
    _set_scales(axes, panel)
    labels = sum(bool(line.label) for line in panel.lines)
    if labels:
        axes.legend(loc="best", fontsize=8 if labels <= _MOST_LABELS else 6, ncols=1 if labels <= _MOST_LABELS else 2)


def _set_scales(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xlim(-0.02 * max(panel.last, 1), 1.03 * max(panel.last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
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


def rank_figure(spectra: Spectra) -> Figure:
    """The paper's Figures 3 and 5: rank beside effective rank, layer x module, in one scale."""
    ratio = (
        f"Effective rank: {100 * spectra.ratio:.1f} % of the rank" if spectra.ratio is not None else "Effective rank"
    )
    return maps_figure({"Rank": spectra.ranks, ratio: spectra.effective})


def maps_figure(maps: Mapping[str, Mapping[str, float]]) -> Figure:
    """Heat maps layer x module in one scale, side by side.

    Args:
        maps: title -> value of each module by its full name.
    """
    from matplotlib.figure import Figure

    grids = {title: layer_grid(values) for title, values in maps.items()}
    largest = max((value for values in maps.values() for value in values.values()), default=0) or 1
    first = next(iter(grids.values()))
    wide = max(_CELL[0] * len(first.columns), 2.4)
    high = _CELL[1] * len(first.rows)
    left = 0.45 + _LETTER * max(map(len, first.rows), default=0)
    bottom = 0.25 + 0.055 * max(map(len, first.columns), default=0)
    width = left + wide + 0.15
    with styled():
        figure = Figure(figsize=(width * len(grids), bottom + high + 0.4))
        for place, (title, grid) in enumerate(grids.items()):
            _draw_map(_add_axes(figure, width * place + left, bottom, wide, high), grid, title, largest)
    return figure


def _draw_map(axes: Axes, grid: Grid, title: str, largest: float) -> None:
    import matplotlib

    means = [[sum(cell) / len(cell) if cell else math.nan for cell in row] for row in grid.cells]
    axes.set_title(title)
    axes.grid(False)
    colours = matplotlib.colormaps["cividis"]
    mesh = axes.pcolormesh(means, cmap=colours, vmin=0, vmax=largest, edgecolors=PAPER, linewidth=0.8)
    mesh.set_rasterized(False)
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            if not math.isnan(mean):
                text = f"{mean:.0f}" if mean == round(mean) else f"{mean:.1f}"
                _write_in_cell(axes, x, y, text, dark=mean / largest < 0.55, size=7.0)
    axes.set_xticks([x + 0.5 for x in range(len(grid.columns))], grid.columns, rotation=40, ha="right")
    axes.set_yticks([y + 0.5 for y in range(len(grid.rows))], grid.rows)
    axes.tick_params(labelsize=7.5)
    if len(grid.rows) > 1:
        axes.set_ylabel("layer")
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
                axes = _add_axes(figure, *corner, _SQUARE, _SQUARE)
                mesh = _draw_cosines(axes, found[module], f"{labels[module]}\n{run}" if several else labels[module])
        if scale:
            beside = _add_axes(figure, width * columns - 0.2, height * (rows - 1) + bottom, 0.09, _SQUARE)
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
                _write_in_cell(axes, x, y, f"{value:.2f}".replace("-0.00", "0.00"), dark=abs(value) > 0.6, size=6.5)
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


def _write_in_cell(axes: Axes, x: int, y: int, text: str, *, dark: bool, size: float) -> None:
    colour = "#ffffff" if dark else "#111111"
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def _without_frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
