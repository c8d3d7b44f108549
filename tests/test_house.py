"""Imports point one way through the house, and in no circle; an import for the types' sake alone counts too."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "qaroma"
# From the command line down; a folder may import those below, and its neighbours where no circle comes of it.
ORDER = (
    {"__init__", "__main__"},
    {"cli"},
    {"training", "compare", "bench", "benchmarks", "doctor", "page"},
    {"export", "report", "inference", "plan"},
    {"tasks", "engine"},
    {"model", "data", "runs", "config"},
    {"method"},
    {"text"},
    {"errors"},
)


def imported_parts(file: Path) -> set[str]:
    """The folders and loose files of the package that a file names in an import, wherever it stands."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write the whole name of what is imported"
            own = [f"qaroma.{a.name}" for a in node.names if not a.name.startswith("_")]
            names += own if node.module == "qaroma" else [node.module or ""]
    return {name.split(".")[1] for name in names if name.startswith("qaroma.")}


def test_imports_point_downwards_and_in_no_circle() -> None:
    floor = {part: floor for floor, parts in enumerate(ORDER) for part in parts}
    imports: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imports.setdefault(part, set()).update(imported_parts(file) - {part})
    assert set(imports) == set(floor), "a part of the package has no place in ORDER, or is gone"
    assert not {(a, b) for a, parts in imports.items() for b in parts if floor[b] < floor[a]}
    TopologicalSorter(imports).prepare()  # names the circle, if there is one
