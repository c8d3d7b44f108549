"""Writing a configuration where the user wants it."""

from __future__ import annotations

from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.runs.files import write_atomically


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
