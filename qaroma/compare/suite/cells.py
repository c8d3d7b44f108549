"""Cells: one arm on one bed with one seed, each a JSON file, so that a suite goes on whatever stopped it."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import qaroma
from qaroma.runs.files import read_json, write_atomically

# What decides how growth behaves: an edit to it makes the cells of growth ones of another rule.
_RULE = ("method", "config/presets.py", "config/growth_presets.py")


@dataclass(frozen=True)
class Cell:
    """One run, or one measurement of time.

    Attributes:
        bed: its name.
        arm: a method as :func:`qaroma.compare.specs.parse_spec` reads it: ``lora:8``, ``aroma+growth.window=1``.
        seed: of data order and initial values.
        rate: learning rate; None is what the preset decides.
        factor: by which the preset's rate is multiplied.
        cost: time steps in turns with those of LoRA instead of training to the end.
    """

    bed: str
    arm: str
    seed: int
    rate: float | None = None
    factor: float = 1.0
    cost: bool = False

    @property
    def grows(self) -> bool:
        return not self.arm.startswith("lora:")

    def file(self) -> str:
        """Path of its JSON below the output folder."""
        name = re.sub(r"[^A-Za-z0-9._+=-]+", "-", self.arm)
        name += "" if self.rate is None else f"@{self.rate:.4g}"
        name += "" if self.factor == 1.0 else f"x{self.factor:g}"
        rule = f"-{growth_rule()}" if self.grows else ""
        return f"cells/{self.bed}/{'cost-' if self.cost else ''}{name}{rule}-s{self.seed}.json"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Figures = dict[str, Any]


class Results:
    """The cells of an output folder that are done.

    Args:
        folder: made when the first cell is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Cell, Figures] = {}

    def get(self, cell: Cell) -> Figures | None:
        """The figures of a cell; None while it is not done."""
        if cell not in self._known:
            found = read_json(self.folder / cell.file())
            if not found:
                return None
            self._known[cell] = found["figures"]
        return self._known[cell]

    def put(self, cell: Cell, figures: Figures) -> None:
        """Write a cell, whole or not at all."""
        path = self.folder / cell.file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"cell": cell.to_json(), "figures": figures}, indent=1))


@lru_cache(maxsize=1)
def growth_rule() -> str:
    """Eight characters that change with the code of growth, comments and docstrings left out."""
    package = Path(qaroma.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(path for part in _RULE for path in _modules(package / part)):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{file.name} {ast.dump(tree)}".encode())
    return digest.hexdigest()[:8]


def _modules(path: Path) -> Iterator[Path]:
    yield from path.glob("*.py") if path.is_dir() else [path]
