"""The configurations that come with qaroma: what each is for and needs, and a copy to change.

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
from qaroma.runs.files import write_atomically

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


def copy_shipped(name: str, destination: Path | None = None, *, force: bool = False) -> Path:
    """Copy a shipped configuration to where it can be changed.

    Args:
        name: as :func:`list_shipped` gives it.
        destination: a file or a folder; None is the current folder.
        force: overwrite a file that is there.

    Returns:
        The copy.

    Raises:
        QaromaError: no such configuration, a file stands in the way, or it cannot be written.
    """
    stem, known = name.removesuffix(".yaml").removeprefix("configs/"), shipped_configs()
    if stem not in known:
        near = [one for one in known if difflib.get_close_matches(Path(stem).name, [Path(one).name], cutoff=0.7)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise QaromaError(f"got {name}; {hint}expected one that comes with qaroma: {', '.join(known)}")
    source = shipped_folder() / f"{stem}.yaml"
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    write_config(target, source.read_text(encoding="utf-8"), force=force)
    return target


def write_config(target: Path, text: str, *, force: bool) -> None:
    """Write a configuration; one that is there stays unless ``force``.

    Raises:
        QaromaError: a file stands in the way, or it cannot be written.
    """
    if target.exists() and not force:
        raise QaromaError(f"{target} is there already and is left as it was; type --force, or name another file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text)
    except OSError as error:
        raise QaromaError(f"cannot write {target} ({error.strerror}); name another file") from error


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
