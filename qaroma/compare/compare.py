"""``qaroma compare``: every method with every seed, then one table and the verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qaroma.compare.collect import MethodFigures, collect, reference_of
from qaroma.compare.machine import one_card_each
from qaroma.compare.plot import draw
from qaroma.compare.processes import Folder, carry_out
from qaroma.compare.specs import MakeConfig, PlannedRun, plan_runs, report, shared_settings
from qaroma.compare.table import markdown
from qaroma.compare.verdict import verdict
from qaroma.config.methods import METHODS
from qaroma.config.metrics import metric_facts
from qaroma.config.presets import DataFacts, resolve
from qaroma.config.schema import GrowthSection
from qaroma.errors import QaromaError
from qaroma.report.style import has_matplotlib
from qaroma.runs.figures import figures_of
from qaroma.runs.files import read_json, write_atomically
from qaroma.runs.finding import open_run
from qaroma.runs.reading import Run, read_run
from qaroma.runs.stop import StopRequest
from qaroma.training.prepare import prepare_data


def compare(
    make_config: MakeConfig,
    *,
    methods: str,
    seeds: str,
    folder: str,
    command: str,
    gpus: int | None = None,
    table_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished, and write ``table.md``, ``results.json``, ``plot.png`` and ``plot.svg``.

    Args:
        make_config: the configuration that all methods share, with ``key=value`` texts on top.
        methods, seeds: as typed; see :func:`qaroma.compare.specs.plan_runs`.
        folder: where runs and results go.
        command: what was typed, for the table.
        gpus: runs side by side, each on one of as many; None is one at a time, on what it chooses.
        table_only: run nothing; the table is of what is finished.
        console: where progress goes; None is stderr.

    Returns:
        What ``results.json`` holds.

    Raises:
        QaromaError: anything wrong with what was asked, before the first run; runs that failed, at the end.
        KeyboardInterrupt: stopped by the user, with the state of the runs at work saved.
    """
    console = console or Console(file=sys.stderr)
    cards = [None] if gpus is None or table_only else one_card_each(gpus)
    place = Folder(folder)
    runs = plan_runs(make_config, methods, seeds, Path(folder).as_posix())
    base = make_config([])
    steps = base.training.max_steps or place.known_steps(runs)
    for planned in runs:
        planned.config.training.max_steps = steps
    changed = [sentence for planned in runs for sentence in place.changed(planned)]
    if changed:
        raise report([*changed, f"leave them as they were, choose another --output, or delete these runs in {folder}"])
    todo = [planned for planned in runs if not place.finished(planned)]
    failed: dict[str, str] = {}
    if todo and table_only:
        failed = {planned.name: "not finished" for planned in todo}
    elif todo:
        _prepare(make_config, todo, runs, console)
        failed = _carry_out(todo, place, command, cards, console)
    results = _write(runs, failed, place, command)
    if not any(method["n"] for method in results["methods"]):
        raise QaromaError(f"no run of {folder} is finished: {_first(failed)}")
    if failed and not table_only:
        raise QaromaError(
            f"{len(failed)} of {len(runs)} runs failed; the table in {place.path / 'table.md'} is of the others. "
            f"First: {_first(failed)}; the whole log: {place.path / 'logs' / next(iter(failed))}.log. "
            "Type the same command again to try them once more"
        )
    return results


def _prepare(make_config: MakeConfig, todo: Sequence[PlannedRun], runs: Sequence[PlannedRun], console: Console) -> None:
    """Read the data once: the step budget that all share, and whether every method's settings go together."""
    base = make_config([])
    # Every method has settings of its own; of those that all share, these decide the step budget.
    shared = base.model_copy(deep=True)
    shared.growth = GrowthSection(preset=base.growth.preset, inner_rank=base.growth.inner_rank)
    shared.training.max_steps = todo[0].config.training.max_steps
    data = prepare_data(shared)
    steps = data.config.training.max_steps
    facts = DataFacts(len(data.train), [data.config.data.max_length], None, len(data.validation))
    problems = []
    for planned in runs:
        planned.config.training.max_steps = steps
    for label, planned in {planned.spec.label: planned for planned in todo}.items():
        try:
            METHODS[planned.spec.method].require()
            resolve(planned.config, facts)
        except QaromaError as error:
            problems.append(f"{label}: {error}")
    if problems:
        raise report(problems)
    for note in data.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{steps} steps for every run that does not end before; {len(todo)} runs to go", highlight=False)
    held = shared_settings(base)
    if held:
        console.print(
            f"the configuration sets {', '.join(held)} for all methods; +KEY=VALUE behind a method gives it its own, "
            "and =null its preset's",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _carry_out(
    todo: Sequence[PlannedRun], place: Folder, command: str, cards: Sequence[str | None], console: Console
) -> dict[str, str]:
    """Run one on each card at a time; what failed, by name, with the reason."""
    failed = {}

    def ended(planned: PlannedRun, reason: str | None) -> None:
        name = f"{planned.name}: " if len(cards) > 1 else ""
        if reason is not None:
            failed[planned.name] = reason
            console.print(f"  {name}failed: {reason}", style="red", highlight=False, markup=False)
            return
        console.print(f"  {name}{_outcome(read_run(place.run(planned).path))}", highlight=False, markup=False)

    try:
        with StopRequest() as stop:
            carry_out(todo, place, console, stop, ended, cards)
    except KeyboardInterrupt:
        console.print(f"stopped; go on with the same command: {command}", soft_wrap=True, markup=False)
        raise
    return failed


def _outcome(run: Run) -> str:
    judged = figures_of(run).of(run.metric)
    value = f"{judged.name} {metric_facts(judged.name).text(judged.last)}" if judged else "no validation data"
    return f"{run.step} steps, {run.ended}, {value}"


def _collected(
    runs: Sequence[PlannedRun], failed: dict[str, str], place: Folder
) -> tuple[list[MethodFigures], dict[str, list[Run]]]:
    """The figures of every method, and the finished runs by its label; one that cannot be read is missing."""
    methods: list[MethodFigures] = []
    finished: dict[str, list[Run]] = {}
    for spec in dict.fromkeys(planned.spec for planned in runs):
        own = [planned for planned in runs if planned.spec == spec]
        lacking = {planned.seed: failed[planned.name] for planned in own if planned.name in failed}
        figures = []
        for planned in own:
            if not place.finished(planned):
                continue
            try:
                run = open_run(place.run(planned).path)
                figures.append(collect(run, planned.seed))
            except QaromaError as error:
                lacking[planned.seed] = str(error)
            else:
                finished.setdefault(spec.label, []).append(run)
        methods.append(MethodFigures(spec, figures, lacking))
    return methods, finished


def _write(runs: Sequence[PlannedRun], failed: dict[str, str], place: Folder, command: str) -> dict[str, Any]:
    """The results of what is finished, written and returned."""
    methods, finished = _collected(runs, failed, place)
    reference, claims = reference_of(methods), verdict(methods)
    known = read_json(place.hardware)
    machines = list(dict.fromkeys(known[planned.name] for planned in runs if planned.name in known))
    results = {
        "command": command,
        "hardware": machines,
        "metric": next((run.metric for method in methods for run in method.runs), None),
        "max_steps": runs[0].config.training.max_steps,
        "reference": reference.spec.label if reference else None,
        "methods": [method.to_json(reference) for method in methods],
        "claims": [claim.to_json() for claim in claims],
        "table": markdown(methods, reference, claims, command=command, machines=machines),
    }
    if not any(method.runs for method in methods):
        return results
    write_atomically(place.path / "results.json", json.dumps(results, indent=2))
    write_atomically(place.path / "table.md", str(results["table"]))
    if has_matplotlib():
        draw(finished, str(results["metric"]), place.path)
    return results


def _first(failed: dict[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in failed.items()), "")
