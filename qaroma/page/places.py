"""The folders of the page, all below the working folder, and what may be named in them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

from qaroma.data.files import EXPECTED, data_suffix
from qaroma.errors import QaromaError
from qaroma.runs.files import make_directory, unused

UPLOADS, LOGS, RUNS = Path("qaroma-page/data"), Path("qaroma-page/logs"), Path("runs")
LARGEST_UPLOAD = 256 * 2**20  # bytes


async def receive(name: str, pieces: AsyncIterator[bytes]) -> str:
    """Write a file that comes in pieces.

    Args:
        name: that it had, without folders.
        pieces: its bytes.

    Returns:
        Its name in the folder of uploads, another one where that was taken.

    Raises:
        QaromaError: a name with folders, a kind of file that is not read, or more than :data:`LARGEST_UPLOAD`.
    """
    if not name or {"/", "\\", "\0"} & set(name) or name.startswith("."):
        raise QaromaError(f"got the file name '{name[:80]}'; expected one without folders")
    if not data_suffix(Path(name)):
        raise QaromaError(f"got '{name[:80]}'; {EXPECTED}")
    make_directory(UPLOADS)
    stem, _, kind = re.sub(r"[^\w.-]+", "-", name).strip("-").partition(".")
    path = unused(inside(UPLOADS, stem), f".{kind}")
    size, aside = 0, path.with_name(f"{path.name}.part")
    try:
        with aside.open("xb") as file:
            async for piece in pieces:
                size += len(piece)
                if size > LARGEST_UPLOAD:
                    raise QaromaError(
                        f"the file has more than {LARGEST_UPLOAD // 2**20} MiB, the most that the page takes; use the "
                        "command line: qaroma finetune --model MODEL --data FILE"
                    )
                file.write(piece)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    return path.name


def inside(folder: Path, name: str) -> Path:
    """A file or folder right in a folder.

    Raises:
        QaromaError: a name that leads anywhere else, also through a link.
    """
    path = folder / name
    if not re.fullmatch(r"\w[\w.-]*", name) or path.resolve() != folder.resolve() / name:
        raise QaromaError(f"got the name '{name[:80]}'; expected one of something in {folder.as_posix()}")
    return path
