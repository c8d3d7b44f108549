"""How figures look, and how they become files: one palette, deterministic PNG and SVG, no pyplot.

Matplotlib's figures are made directly, so that no global state of a program that draws, too, is
touched and no window system is asked for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaroma.errors import QaromaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common form of colour blindness. The light yellow,
# which white paper swallows, is left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280")
INK, MUTED, RULE, PAPER = "#22262b", "#5b6470", "#e1e4e8", "#fefefe"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

_DPI = 160
_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Nirmala UI", "Noto Sans Devanagari", "Arial Unicode MS",
)  # fmt: skip

_VARIABLES = {
    **{colour: f"var(--series-{place}, {colour})" for place, colour in enumerate(PALETTE)},
    INK: f"var(--ink, {INK})",
    MUTED: f"var(--muted, {MUTED})",
    RULE: f"var(--rule, {RULE})",
    PAPER: f"var(--paper, {PAPER})",
}
_SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.fontsize": 9,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.6,
    "figure.facecolor": PAPER,
    "savefig.facecolor": "auto",
    "text.parse_math": False,  # names may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "qaroma",
}


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def need_matplotlib() -> None:
    """Raises a QaromaError that says how to install matplotlib, where it is missing."""
    if not has_matplotlib():
        raise QaromaError("figures need matplotlib, which is not installed; type: pip install 'qaroma[report]'")


@contextmanager
def styled() -> Iterator[None]:
    """Within the block, figures are made and saved in this style; matplotlib's own settings come back after it."""
    import matplotlib

    plain = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    chosen: Any = {**plain, **_SETTINGS, "font.sans-serif": _fonts()}
    with matplotlib.rc_context(chosen), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box
        yield


def _fonts() -> list[str]:
    """Matplotlib's own, and those of this machine for what it has no letters for."""
    from matplotlib.font_manager import fontManager

    there = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in there)]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as ``.png`` or ``.svg``; the same figure gives the same bytes."""
    if path.is_symlink():
        path.unlink()  # a run from elsewhere may bring one, which is not written through
    with styled():
        if path.suffix == ".svg":
            path.write_text(_svg(figure), encoding="utf-8")
            return
        path.write_bytes(_png(figure))


def _png(figure: Figure) -> bytes:
    """The pixels in the 256 colours that a drawing has at most, which takes less than half of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    data = BytesIO()
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(data, format="png")
    return data.getvalue()


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element of an HTML page.

    Colours follow the page's variables (``--ink``, ``--series-0`` ...), so that it reads on a dark
    page too; ids begin with ``name``, so that several figures do not meet.

    Args:
        figure: what to write.
        name: unique in the page; letters, digits and dashes.
        label: what the figure shows, for readers who do not see it.
    """
    with styled():
        text = _svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # hundredths are seen
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLES.get(match[0], match[0]), text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{safe}" style="max-width: {figure.get_figwidth() * 96:.0f}px">{rest}'


def _svg(figure: Figure) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()
