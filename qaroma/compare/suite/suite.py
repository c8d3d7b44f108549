"""``qaroma compare --suite growth``: carry out what the tables want, and write them as they grow."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qaroma.compare.machine import hardware
from qaroma.compare.specs import parse_spec
from qaroma.compare.suite import figure
from qaroma.compare.suite.beds import choose_beds
from qaroma.compare.suite.cells import Cell, Results, growth_rule
from qaroma.compare.suite.pool import Pool
from qaroma.compare.suite.tables import TABLES
from qaroma.compare.suite.view import Table, View
from qaroma.config.load import read_settings
from qaroma.errors import QaromaError
from qaroma.report.style import has_matplotlib
from qaroma.runs.files import write_atomically
from qaroma.text.paths import local_path


def run_suite(
    *,
    folder: str,
    data: str,
    command: str,
    ours: str = "aroma",
    beds: str | None = None,
    tables: str = "oracle,ladder,planted",
    seeds: tuple[int, ...] | None = None,
    jobs: int = 2,
    table_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not done, and write ``table.md``, ``results.json``, ``ladder.png`` and ``planted.png``.

    Args:
        folder: where cells, models that are made once, and tables go.
        data: folder that the beds' files lie below.
        command: what was typed, for the table.
        ours: the arm that is judged, as ``aroma`` or ``aroma+growth.schedule=budget``.
        beds: names of beds, separated by commas; None is all.
        tables: names of tables, separated by commas.
        seeds: fresh ones for every bed; None is each bed's own.
        jobs: worker processes, one thread each.
        table_only: run nothing.
        console: where progress goes; None is stderr.

    Returns:
        What ``results.json`` holds.

    Raises:
        QaromaError: an unknown name, no such folder, or cells that failed, at the end.
        KeyboardInterrupt: stopped by the user; the same command goes on.
    """
    console = console or Console(file=sys.stderr)
    chosen = _tables(tables)
    if not local_path(data).is_dir():
        raise QaromaError(
            f"--data: there is no folder '{data}'; a suite wants the folder that its beds' files lie below"
        )
    read_settings(None, {"model.name": "bed", "data.train": ["bed"]}, parse_spec(ours, 8).sets)
    there, lacking = choose_beds(beds, Path(data))
    for sentence in lacking:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    view = View(there, Results(Path(folder)), ours, seeds)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        write_tables(view, chosen, lacking, command)

    failed: dict[Cell, str] = {}
    if not table_only:
        failed = Pool(Path(data), Path(folder), lambda: wanted(view, list(chosen.values())), tell).run(jobs)
    written = write_tables(view, chosen, lacking, command)
    if failed:
        cell, reason = next(iter(failed.items()))
        raise QaromaError(
            f"{len(failed)} cells failed. First: {cell.file()}: {reason}; the whole log: {folder}/workers.log. "
            "Type the same command again to try them once more"
        )
    return written


def wanted(view: View, tables: Sequence[Table]) -> list[Cell]:
    """The cells that tables want and that are not done: all beds' first ones before any bed's second ones."""
    rounds: dict[int, list[Cell]] = {}
    for table in tables:
        for bed in view.beds:
            for turn, cell in enumerate(table.plan(replace(view, beds=[bed]))):
                if view.results.get(cell) is None:
                    rounds.setdefault(turn, []).append(cell)
    return list(dict.fromkeys(cell for turn in sorted(rounds) for cell in rounds[turn]))


def write_tables(view: View, tables: dict[str, Table], lacking: Sequence[str], command: str) -> dict[str, Any]:
    """Write what is known; beds and rows that are not done are not there."""
    folder = view.results.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"Growth: `{view.ours}`, rule {growth_rule()}.", ""]
    values: dict[str, Any] = {}
    for name, table in tables.items():
        rows, sentences, values[name] = table.rows(view)
        text += [f"## {table.title}", ""]
        text += _markdown(rows) if len(rows) > 1 else ["Nothing is done yet.", ""]
        text += [*sentences, ""] if len(rows) > 1 else []
    text += [*(f"- {sentence}" for sentence in lacking), *([""] if lacking else [])]
    text += [f"Measured on {hardware('cpu')}.", "", "```", command, "```", ""]
    results = {"command": command, "ours": view.ours, "rule": growth_rule(), "tables": values, "table": "\n".join(text)}
    write_atomically(folder / "table.md", str(results["table"]))
    write_atomically(folder / "results.json", json.dumps(results, indent=1))
    if has_matplotlib():
        if len(values.get("ladder", [])) > 1:
            figure.draw_ladder(values["ladder"], folder / "ladder.png")
        if values.get("planted"):
            figure.draw_planted(values["planted"], folder / "planted.png")
    return results


def _tables(names: str) -> dict[str, Table]:
    wanted_names = [name.strip() for name in names.split(",")]
    strange = [name for name in wanted_names if name not in TABLES]
    if strange:
        raise QaromaError(f"--tables: got {strange[0]!r}; expected some of {', '.join(TABLES)}")
    return {name: TABLES[name] for name in TABLES if name in wanted_names}


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]
