"""Removing runs: whole ones alone, that nothing works in and that hold nothing but what runs write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.runs.directory import RunDirectory
from qaroma.runs.files import is_leftover, remove_directory
from qaroma.runs.finding import open_run
from qaroma.runs.lock import LOCK, locked
from qaroma.runs.reading import Run

# What stands in a run: its own files, its pages, and what other commands and trackers write there by default.
_WRITTEN = {"config.yaml", "metrics.jsonl", "summary.json", "reference.json", "checkpoints", "adapter", "adapter_last",
            LOCK, "report.html", "report.png", "report", "export", "benchmarks", "tensorboard", "qaroma",
            "wandb"}  # fmt: skip


def removable(paths: Sequence[str | Path]) -> list[Run]:
    """The runs that were named for removal, each once.

    Raises:
        QaromaError: one of them is no run or a link to one, holds other things, or is at work. Nothing is changed.
    """
    found = {Path(path).resolve(): path for path in paths}
    return [_removable(Path(path)) for path in found.values()]


def _removable(path: Path) -> Run:
    if path.is_symlink():
        raise QaromaError(f"{path} is a link; name the folder that it leads to: {path.resolve()}")
    run, place = open_run(path, path.as_posix()), RunDirectory(path)
    if not (place.exists() and (place.metrics.is_file() or place.checkpoints.is_dir())):
        raise QaromaError(f"{path} is no whole run (it has no {place.metrics.name}); look at it and remove it by hand")
    others = sorted(p.name for p in path.iterdir() if p.name not in _WRITTEN and not is_leftover(p.name))
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise QaromaError(f"{path} holds what no run writes ({shown}); move that elsewhere, or remove the run by hand")
    with locked(path):  # let go before the folder is moved: Windows moves none with an open file
        return run


def remove_runs(runs: Sequence[Run]) -> None:
    """Remove runs; each is gone at once, whatever comes between."""
    for run in runs:
        remove_directory(run.path)
