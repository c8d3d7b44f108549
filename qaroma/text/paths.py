"""Paths as users and files spell them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from qaroma.errors import QaromaError
from qaroma.text.characters import is_unicode

_LONGEST_NAME = 255  # bytes, on every file system in common use


def local_path(text: str | Path) -> Path:
    """A path with ``~`` spelt out, one that the system can be asked about.

    Raises:
        QaromaError: the home of nobody, a name that no file can have, or nothing.
    """
    if not str(text).strip():
        raise QaromaError("got an empty text for a path; expected the name of a file or folder")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        who = Path(text).parts[0]
        raise QaromaError(f"got the path '{text}', but {who} is nobody's home here; write the whole path") from None
    if not is_unicode(str(path)):
        raise QaromaError(f"got the path {str(path)!r}, which is not UTF-8; rename the file")
    if "\0" in str(path):
        raise QaromaError(f"got the path {str(text)!r} with a NUL character; expected a name that a file can have")
    longest = max((len(part.encode()) for part in path.parts), default=0)
    if longest > _LONGEST_NAME:
        raise QaromaError(
            f"got a path with a name of {longest} bytes in it ('{str(text)[:60]}...'); "
            f"expected at most {_LONGEST_NAME} bytes, as file systems have it"
        )
    return path


def inside(name: object) -> bool:
    """Whether a file name that another file gives stays in the folder of that file, on every system."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or not is_unicode(name):
        return False
    return all(
        not path.is_absolute() and not path.drive and not path.root and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )
