"""Writing files so that neither a kill nor a full disk leaves half of one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qaroma.foreign.json_text import parse_json

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FULL_ON_WINDOWS = {39, 112}


def disk_full(error: BaseException) -> bool:
    """Whether something could not be written because there is no room left, or no more is allowed.

    safetensors has no OSError for it: the system's number stands in the text of its own exception.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL or getattr(error, "winerror", None) in _FULL_ON_WINDOWS
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and int(number[1]) in _FULL | _FULL_ON_WINDOWS


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or, just now, half written."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Write a file aside, flush it to the disk, and put it in place in one move."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def directory_written_aside(target: Path) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    Yields an empty directory beside ``target``; when the block ends, its files are flushed and it
    takes the target's place. When the block raises, it is removed and the target is as it was.
    """
    aside = target.with_name(target.name + ".part")
    replaced = target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if replaced.exists() and not target.exists():  # a kill between the two moves below
        replaced.rename(target)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            # safetensors writes for the owner alone; the folder has what this user gives to all else.
            file.chmod(aside.stat().st_mode & 0o666)
            flush(file)
        flush(aside)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        aside.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync a file, or a directory where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
