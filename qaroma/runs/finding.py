"""Runs by their names, and those that lie in a folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.runs.directory import RunDirectory
from qaroma.runs.reading import Run, read_run


def open_run(path: str | Path, name: str | None = None) -> Run:
    """As :func:`read_run`, for a run that was named: it must be there and whole.

    Raises:
        QaromaError: no run there, with the nearest name; or one that is broken.
    """
    place = RunDirectory(path)
    if not place.path.exists():
        raise QaromaError(f"{path} is not there; {_nearest(place.path)}")
    if not looks_like_run(place.path):
        what = f"is no run (no {place.config.name}, no {place.metrics.name})"
        raise QaromaError(f"{path} {what}; give a run directory such as runs/NAME (qaroma runs lists them)")
    run = read_run(path, name)
    if run.state == "broken":
        raise QaromaError(f"{path} is damaged: {run.problem}; give another run (qaroma runs lists them)")
    return run


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Several runs, each under the shortest ending of its path that tells it from the others.

    Raises:
        QaromaError: one of them is no run, is broken, or was given twice.
    """
    parts = [Path(path).resolve().parts for path in paths]
    for place, path in enumerate(parts):
        if path in parts[:place]:
            raise QaromaError(f"{paths[place]} was given twice; give each run once")
    names = []
    for path in parts:
        length = 1
        while sum(other[-length:] == path[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(path[-length:]))
    return [open_run(path, name) for path, name in zip(paths, names, strict=True)]


def list_runs(folder: str | Path) -> list[Run]:
    """The runs in a folder, newest first; also those one folder below, and the folder if it is a run.

    Args:
        folder: usually ``runs``.

    Raises:
        QaromaError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise QaromaError(
            f"there is no folder {root.as_posix()}; expected one that holds runs. "
            "Name it: qaroma runs FOLDER, or begin a run: qaroma demo"
        )
    if looks_like_run(root):
        return [read_run(root)]
    found = [read_run(path, path.relative_to(root).as_posix()) for path in _run_paths(root)]
    return sorted(found, key=lambda run: (-run.written, run.name))


def looks_like_run(path: Path) -> bool:
    """Whether a directory holds anything that only runs write."""
    run = RunDirectory(path)
    try:
        return run.exists() or run.metrics.is_file() or run.checkpoints.is_dir()
    except OSError:  # a folder of somebody else's
        return False


def _nearest(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path("runs")
    known = [known.as_posix() for known in _run_paths(parent)] if parent.is_dir() else []
    near = difflib.get_close_matches(path.as_posix(), known, n=1)
    return f"did you mean {near[0]}?" if near else "give a run directory such as runs/NAME (qaroma runs lists them)"


def _run_paths(root: Path) -> Iterator[Path]:
    for path in _folders(root):
        if looks_like_run(path):
            yield path
        else:
            yield from (inner for inner in _folders(path) if looks_like_run(inner))


def _folders(root: Path) -> list[Path]:
    """The folders in one, by name; none where this user may not look."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []
