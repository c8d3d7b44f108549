"""One process at a time in a run: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from qaroma.errors import QaromaError
from qaroma.runs.files import make_directory, read_json

LOCK = "run.lock"
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # some network file systems
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_BYTE = 1 << 30  # the byte that is locked on Windows, far from the text, which others are to read


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run while the block runs.

    The lock is the system's, on the open file ``run.lock``: a process that is killed leaves the file,
    but no lock. The file says whose it is.

    Args:
        folder: of the run; made where it is not there yet.

    Raises:
        QaromaError: another process has it.
    """
    make_directory(folder)
    path = folder / LOCK
    descriptor = _open(path)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        # Removed while it is locked, so that nobody locks a file that is gone; Windows removes no open file. One
        # that stays is no hindrance: only the lock counts.
        if os.name != "nt":
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)
        if os.name == "nt":
            with suppress(OSError):
                path.unlink()


def owner_is_gone(folder: Path) -> bool | None:
    """Whether the process that had the lock of a folder ended without giving it back.

    Args:
        folder: which may be another process's.

    Returns:
        True where the lock's file names a process of this machine that runs no more, and nobody has the lock; False
        where it is in use; None where there is no such file, or it names another machine's process.
    """
    path = folder / LOCK
    said = read_json(path)
    if said.get("host") != socket.gethostname() or not isinstance(said.get("pid"), int):
        return None
    if psutil.pid_exists(said["pid"]):  # on a file system without locks, this alone tells
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | _NO_LINK)
    except OSError:
        return None
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The lock's file, opened and locked."""
    while True:
        if path.is_symlink():  # of a run from elsewhere; what it leads to would be written over
            raise QaromaError(f"{path} is a link; expected none in a run. Remove it, then type the same command again")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        try:
            if not _lock(descriptor):
                raise QaromaError(
                    f"{path.parent} is in use by {_owner(path)}; wait until that has ended, or stop it with Ctrl-C "
                    "where it runs, then type the same command again"
                )
            # The one who had it may have removed the file between the opening and the lock.
            if _is(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Whether the lock could be had; a file system without locks gives none, and keeps nobody out."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _owner(path: Path) -> str:
    said = read_json(path)
    return f"process {said['pid']} on {said['host']}" if {"pid", "host"} <= set(said) else "another process"
