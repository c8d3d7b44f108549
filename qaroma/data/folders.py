"""A folder of data: which of its files are trained on, and which are held out by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qaroma.data.files import EXPECTED, data_suffix
from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

_VALIDATION = {"dev", "val", "valid", "validation", "eval", "evaluation"}
_TEST = {"test", "tests", "testing", "heldout", "holdout"}
_TRAIN = {"train", "training"}
_TWO_WORDS = re.compile(r"(held|hold)[ _-]?out")
_SHARD = {"of", "shard", "part"}


@dataclass(frozen=True)
class FolderFiles:
    """The data files below a folder.

    Attributes:
        train: those to train on.
        validation: those to validate on.
        notes: sentences about those left out.
    """

    train: list[Path]
    validation: list[Path]
    notes: list[str]


def is_saved_table(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of the library datasets."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and any(folder.glob("*.arrow"))
    )


def files_of_folder(folder: Path) -> FolderFiles:
    """The data files below a folder; held-out ones stay out where there are others.

    Raises:
        QaromaError: there is none.
    """
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and data_suffix(file)
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise QaromaError(f"the folder '{folder}' holds no data file; {EXPECTED}.")
    roles = {file: role_of(file.relative_to(folder)) for file in found}
    train = [file for file in found if roles[file] == "train"]
    notes = []
    if _names_files(folder / "dataset_info.json"):
        notes.append(f"{folder}: dataset_info.json is not read; name one of its files with --data, and --columns.")
    if not train:
        return FolderFiles(found, [], notes)
    for role, why in (("test", "left out, held out by their names"), ("validation", "held out to validate on")):
        names = ", ".join(str(file.relative_to(folder)) for file in found if roles[file] == role)
        if names:
            notes.append(f"{folder}: {names} {why}; name a file to train on it.")
    return FolderFiles(train, [file for file in found if roles[file] == "validation"], notes)


def role_of(file: Path) -> str:
    """What a file is for by its name, or by that of the nearest folder that says it: train, validation or test."""
    for part in (file.name.split(".")[0], *reversed(file.parts[:-1])):
        words = [w for w in re.findall(r"[a-z]+", _TWO_WORDS.sub("heldout", part.lower())) if w not in _SHARD]
        for word in (*words[-1:], *words[:1]):
            for role, names in (("train", _TRAIN), ("validation", _VALIDATION), ("test", _TEST)):
                if word in names:
                    return role
    return "train"


def _names_files(description: Path) -> bool:
    """Whether a ``dataset_info.json`` is LLaMA-Factory's, which names files and their columns."""
    try:
        value = parse_json(description.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(isinstance(v, dict) and "file_name" in v for v in value.values())
