"""The configurations that come with qaroma: what each is for and needs.

A shipped configuration begins with a comment. Its first sentence says what the run is; a paragraph
that begins with MEASURED, PLANNED or NOT RUN says what memory and time it takes and what it scores,
and which of the three those figures are.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from qaroma.config.load import shipped_configs, shipped_folder
from qaroma.errors import QaromaError

_KINDS = re.compile(r"(MEASURED|PLANNED|NOT RUN)\b")


@dataclass(frozen=True)
class Shipped:
    """One shipped configuration: its name for ``--config``, its first sentence, and what it needs."""

    name: str
    title: str
    needs: str


def list_shipped() -> list[Shipped]:
    """All shipped configurations, by name."""
    return [_described(name) for name in shipped_configs()]


def find_shipped(name: str) -> Path:
    """The file of a shipped configuration.

    Args:
        name: as :func:`list_shipped` gives it.

    Raises:
        QaromaError: no such configuration.
    """
    stem, known = name.removesuffix(".yaml").removeprefix("configs/"), shipped_configs()
    if stem not in known:
        near = [one for one in known if difflib.get_close_matches(Path(stem).name, [Path(one).name], cutoff=0.7)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise QaromaError(f"got {name}; {hint}expected one that comes with qaroma: {', '.join(known)}")
    return shipped_folder() / f"{stem}.yaml"


def _described(name: str) -> Shipped:
    paragraphs = _header((shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    title = re.split(r"(?<=[.!?])\s", paragraphs[0])[0] if paragraphs else ""
    return Shipped(name, title, " ".join(text for text in paragraphs if _KINDS.match(text)))


def _header(text: str) -> list[str]:
    """The paragraphs of the comment that a file begins with, each joined to one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return [" ".join(part.split()) for part in "\n".join(lines).split("\n\n") if part.strip()]
