"""``report.png``: what the first card of a page says, as one image to share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaroma import __version__
from qaroma.report.answers import Answer, Answered, first_answers
from qaroma.report.drawings import add_axes, draw_map, draw_panel
from qaroma.report.finding import finding
from qaroma.report.keyfigures import description
from qaroma.report.panels import learning_panel
from qaroma.report.rank_map import RankMap, map_of_ranks
from qaroma.report.style import INK, MUTED, RULE, styled
from qaroma.runs.reading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# All in hundredths of an inch, from the upper left corner: the size that pages show of links.
_WIDTH, _HEIGHT, _EDGE, _GAP = 1200, 630, 48, 28
_INNER = _WIDTH - 2 * _EDGE
_GOOD, _BAD = "#00724f", "#a94a00"
_HEADLINE, _TEXT, _SMALL = (30.0, 24.0, 19.0, 15.0), 12.0, 10.5
_MAP_BOTTOM, _MAP_ROW, _MAP_COLUMN, _MAP_TEXT = 84, 22, 60, 9.0
_MARK, _BESIDE = 24, 86  # what stands before an answer: its mark, its mark and label
_HINTED = 1.04  # letters that are fitted to pixels are wider than their outlines
_MOST_LAYERS = 48  # a map of more has cells that no number fits in


def card_figure(run: Run) -> Figure:
    """The headline, answers before and after or else the curve, and the ranks that were found."""
    from matplotlib.figure import Figure

    ranks, answers = map_of_ranks(run), first_answers(run)
    with styled():
        figure = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100))
        _rule(figure, 0, _WIDTH, 4, "#1f5f9e", thickness=8)
        y = _head(figure, run)
        bottom = _map(figure, ranks) if ranks else _HEIGHT - 56
        if answers:
            _answers(figure, answers, y + 12, bottom - 16)
        elif learning_panel(run).lines:
            axes = add_axes(figure, 1.0, (_HEIGHT - bottom) / 100 + 0.65, 10.4, max(1.0, (bottom - y) / 100 - 0.95))
            draw_panel(axes, learning_panel(run))
        _write(figure, _WIDTH - _EDGE, _HEIGHT - 40, [f"made with qaroma {__version__}"], _SMALL, MUTED, right=True)
    return figure


def _head(figure: Figure, run: Run) -> float:
    """Description, headline and note; returns where they end."""
    found = finding(run)
    y = _write(figure, _EDGE, 34, _wrapped(description(run), _INNER, _TEXT, 1), _TEXT, MUTED)
    size = next((s for s in _HEADLINE if _width(found.headline, s, bold=True) <= _INNER), _HEADLINE[-1])
    colour = _BAD if found.better is False else INK
    y = _write(figure, _EDGE, y + 8, _wrapped(found.headline, _INNER, size, 2, bold=True), size, colour, bold=True)
    return _write(figure, _EDGE, y + 6, _wrapped(found.note, _INNER, _TEXT, 2), _TEXT, MUTED)


def _answers(figure: Figure, rows: list[Answered], top: float, bottom: float) -> None:
    """A column a prompt: the first and the last answer, marked where it is known which is right."""
    width = (_INNER - _GAP * (len(rows) - 1)) / len(rows)
    lines = max(2, int((bottom - top - 70) / _line_height(_TEXT)))  # of both answers
    for place, row in enumerate(rows):
        x, y = _EDGE + place * (width + _GAP), top
        _rule(figure, x, x + width, y, RULE)
        y = _write(figure, x, y + 12, _wrapped(row.prompt, width, _TEXT, 2, bold=True), _TEXT, INK, bold=True)
        shown = list(dict.fromkeys((row.answers[0], row.answers[-1])))
        for answer, most in zip(shown, _shares(shown, width, lines), strict=True):
            y = _answer(figure, answer, x, y + 6, width, most, last=answer is row.answers[-1])


def _shares(answers: Sequence[Answer], width: float, lines: int) -> list[int]:
    """How many lines each answer may have: half of them, or what the other one leaves."""
    needed = [len(_wrapped(answer.text, width - _BESIDE, _TEXT, lines)) for answer in answers]
    return [max(lines // 2, lines - (sum(needed) - own)) for own in needed]


def _answer(figure: Figure, answer: Answer, x: float, y: float, width: float, lines: int, *, last: bool) -> float:
    if answer.right is not None:
        mark, colour = ("\N{CHECK MARK}", _GOOD) if answer.right else ("\N{BALLOT X}", _BAD)
        _write(figure, x, y - 3, [mark], 15.0, colour)
        x, width = x + _MARK, width - _MARK
    _write(figure, x, y + 2, [answer.label], _SMALL, MUTED)
    ink, indent = INK if last else MUTED, _BESIDE - (0 if answer.right is None else _MARK)
    return _write(figure, x + indent, y, _wrapped(answer.text, width - indent, _TEXT, lines), _TEXT, ink)


def _map(figure: Figure, found: RankMap) -> float:
    """The map along the lower edge, layers across, with what it shows; returns where it begins."""
    labels = 12 + max(_width(kind, _MAP_TEXT) for kind in found.kinds)
    width = min(_INNER - labels, _MAP_COLUMN * len(found.layers))
    height = min(_MAP_ROW * len(found.kinds), 200)
    axes = add_axes(figure, (_EDGE + labels) / 100, _MAP_BOTTOM / 100, width / 100, height / 100)
    draw_map(axes, found, size=_MAP_TEXT, across=True, numbered=len(found.layers) <= _MOST_LAYERS)
    _write(figure, _EDGE, _HEIGHT - 40, _wrapped(f"{found.finding} Layers across.", 860, _SMALL, 1), _SMALL, MUTED)
    return _HEIGHT - _MAP_BOTTOM - height


def _write(
    figure: Figure,
    x: float,
    y: float,
    lines: list[str],
    size: float,
    colour: str,
    *,
    bold: bool = False,
    right: bool = False,
) -> float:
    """Lines from a corner down; returns where they end."""
    for line in lines:
        figure.text(
            x / _WIDTH, 1 - y / _HEIGHT, line, fontsize=size, color=colour, va="top",
            ha="right" if right else "left", weight="bold" if bold else "normal",
        )  # fmt: skip
        y += _line_height(size)
    return y


def _rule(figure: Figure, left: float, right: float, y: float, colour: str, thickness: float = 1) -> None:
    from matplotlib.lines import Line2D

    up = 1 - y / _HEIGHT
    line = Line2D([left / _WIDTH, right / _WIDTH], [up, up], color=colour, linewidth=0.72 * thickness)
    figure.add_artist(line)


def _line_height(size: float) -> float:
    return 1.3 * size / 0.72


def _width(text: str, size: float, *, bold: bool = False) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return _HINTED * float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 0.72


def _wrapped(text: str, width: float, size: float, most: int, *, bold: bool = False) -> list[str]:
    """A text in at most so many lines; what has no space to break at breaks anywhere."""
    lines = [""]
    for word in re.findall(r"\S+ ?", " ".join(text.split())):
        pieces = [word] if _width(word.strip(), size, bold=bold) <= width else list(word)
        for piece in pieces:
            if _width((lines[-1] + piece).strip(), size, bold=bold) <= width:
                lines[-1] += piece
            else:
                lines.append(piece)
    if len(lines) <= most:
        return lines
    kept = lines[:most]
    while kept[-1] and _width(f"{kept[-1]} ...", size, bold=bold) > width:
        shorter = kept[-1].rstrip().rpartition(" ")[0]
        kept[-1] = shorter or kept[-1][:-1]
    return [*kept[:-1], f"{kept[-1].rstrip()} ..."]
