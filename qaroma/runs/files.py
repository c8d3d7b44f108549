"""Writing files so that neither a kill, a power cut nor a full disk leaves half of one.

What is written aside has a name of its own, ``<target>.part-1a2b3c4d``: nothing is removed that was not made here.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FULL_ON_WINDOWS = {39, 112}

_PART, _OLD, _RANDOM = "part", "old", "[0-9a-f]" * 8
_LEFT_OVER = re.compile(r"(?P<target>.+)\.(?P<kind>part|old)-[0-9a-f]{8}")

# renameat2 of Linux: two directories change places in one step. Other systems and some file systems lack it.
_HERE, _EXCHANGE = -100, 2
_LACKING = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def system_error(error: BaseException) -> int | None:
    """The system's number of what went wrong with a file; None where that is not what went wrong.

    safetensors has no OSError for it: the number stands in the text of its own exception.
    """
    if isinstance(error, OSError):
        return getattr(error, "winerror", None) or error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else None


def disk_full(error: BaseException) -> bool:
    """Whether something could not be written because there is no room left, or no more is allowed."""
    found = {error.errno} if isinstance(error, OSError) else set()
    return bool({*found, system_error(error)} & (_FULL | _FULL_ON_WINDOWS))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or, just now, half written."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Write a file aside, flush it to the disk, and put it in place in one move.

    Raises:
        QaromaError: a folder or a device is there.
    """
    _require_kind(path, directory=False)
    aside = _beside(path, _PART)
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def directory_written_aside(target: Path) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    Yields an empty directory beside ``target``; when the block ends, its files are flushed and it
    takes the target's place, which is never empty in between where the system can exchange two
    directories. When the block raises, it is removed and the target is as it was.

    Raises:
        QaromaError: something else than a directory is there.
    """
    _require_kind(target, directory=True)
    heal(target)
    make_directory(target.parent)
    aside = _beside(target, _PART)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*"), reverse=True):  # what lies in a directory comes before it
            if path.is_file():
                # safetensors writes for the owner alone; the folder has what this user gives to all else.
                path.chmod(aside.stat().st_mode & 0o666)
            flush(path)
        flush(aside)
        replaced = _take_place(aside, target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if replaced is not None:
        _remove(replaced)


def cut_in_two(target: Path) -> Path | None:
    """What was at ``target`` before a kill came between the two moves of a replacement; None where none did."""
    if target.exists():
        return None
    waiting = list(target.parent.glob(f"{glob.escape(target.name)}.{_OLD}-{_RANDOM}"))
    return max(waiting, key=lambda path: path.stat().st_mtime, default=None)


def heal(target: Path) -> None:
    """Put back what :func:`cut_in_two` finds; only where nobody else writes now."""
    waiting = cut_in_two(target)
    if waiting is not None:
        waiting.rename(target)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left half written, or replaced and not yet removed.

    Args:
        folder: in which nobody else writes now.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFT_OVER.fullmatch(path.name)
        if match is None or (match["kind"] == _OLD and not path.with_name(match["target"]).exists()):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def written_aside(target: Path) -> list[Path]:
    """Directories that were written aside to take the place of ``target``: left by a kill, or being written now."""
    found = target.parent.glob(f"{glob.escape(target.name)}.{_PART}-{_RANDOM}")
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def is_leftover(name: str) -> bool:
    """Whether a file or directory of that name was written aside here, and left by a kill."""
    return _LEFT_OVER.fullmatch(name) is not None


def remove_directory(path: Path) -> None:
    """Remove a directory so that it is never there in half."""
    aside = _beside(path, _PART)
    path.rename(aside)
    flush(path.parent)
    shutil.rmtree(aside)


def copy_files(source: Path, target: Path) -> None:
    """Fill a new directory with a directory's files: as hard links where the file system has them, which cost no room.

    Args:
        source: whose files are replaced as a whole, never written into.
        target: made.
    """
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # none here, or no more of this file; a disk that is full fails at the copy again
            shutil.copyfile(file, target / file.name)


def unused(path: Path, ending: str = "") -> Path:
    """``path`` with an ending, or ``path-2`` with it and so on where that is taken."""
    number, found = 1, path.with_name(f"{path.name}{ending}")
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}{ending}")
    return found


def make_directory(path: Path) -> None:
    """Make a directory and those above it, each of them safe from a power cut."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file, or a directory where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{kind}-{secrets.token_hex(4)}")


def _require_kind(path: Path, *, directory: bool) -> None:
    """See to it that what a path is put in the place of is of its kind; a link is replaced, never what it leads to."""
    if path.exists() and not path.is_symlink() and not (path.is_dir() if directory else path.is_file()):
        raise QaromaError(f"{path} is there and is no {'folder' if directory else 'file'}; choose another name")


def _remove(path: Path) -> None:
    """Remove a directory, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _take_place(aside: Path, target: Path) -> Path | None:
    """Move a directory to ``target``; returns where what was there before is now, to be removed."""
    if not os.path.lexists(target):
        aside.rename(target)
        return None
    if exchange(aside, target):
        return aside
    replaced = _beside(target, _OLD)
    target.rename(replaced)  # a kill after this line is what heal is for
    try:
        aside.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    return replaced


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(other))
