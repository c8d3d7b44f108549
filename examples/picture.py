"""Draw README's picture, answers before and after: python examples/picture.py runs/demo examples/report.png"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from qaroma.runs.reading import read_run

SHOWN = 3
INK, DIM, GOOD, BAD, PAPER = "#111827", "#4b5563", "#15803d", "#b91c1c", "#ffffff"
_LETTERS = 120  # of an answer


def picture(folder: Path) -> Figure:
    """The first answers of a run's generation test, before and after training, with their marks.

    Args:
        folder: of a finished run that has a generation test, as ``qaroma demo`` leaves it.
    """
    run = read_run(folder)
    before, after = run.answers[0], run.answers[-1]
    figure = Figure(figsize=(11, 3.5), facecolor=PAPER)
    title = (
        f"{len(after['prompts'])} requests that it has not seen: {before['exact_match']:.0%} answered exactly before, "
        f"{after['exact_match']:.0%} after {run.step} steps"
    )
    figure.text(0.03, 0.9, title, color=INK, fontsize=13.5, weight="bold")
    for x, heading in ((0.03, "request"), (0.28, "before"), (0.62, "after")):
        figure.text(x, 0.78, heading, color=DIM, fontsize=11)
    for number in range(min(SHOWN, len(after["prompts"]))):
        y = 0.69 - 0.23 * number
        figure.text(0.03, y, textwrap.fill(after["prompts"][number], 28), color=INK, fontsize=12, va="top")
        for x, answers, width in ((0.28, before, 42), (0.62, after, 41)):
            right = answers["answers"][number] == after["expected"][number]
            figure.text(x, y, "✓" if right else "✗", color=GOOD if right else BAD, fontsize=14, va="top")
            text = textwrap.shorten(answers["answers"][number], _LETTERS, placeholder=" …")
            family, size = ("monospace", 10.5) if right else ("sans-serif", 11)
            figure.text(x + 0.025, y, textwrap.fill(text, width), color=INK if right else DIM, fontsize=size, va="top",
                        family=family)  # fmt: skip
    return figure


if __name__ == "__main__":
    picture(Path(sys.argv[1])).savefig(sys.argv[2], dpi=110)
