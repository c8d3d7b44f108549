"""From scored questions to figures: accuracy with its interval, task by task, and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from qaroma.benchmarks.commonsense import TaskSet

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, within 0 and 1.

    Args:
        correct: Successes.
        total: Trials, at least one.
    """
    share, z2 = correct / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(
    sets: Sequence[TaskSet], scored: Mapping[tuple[str, int], Mapping[str, Any]], scorer: str
) -> dict[str, Any]:
    """Figures of scored questions.

    Args:
        sets: The tasks and the questions that count.
        scored: The record of each question, by task and row, see :mod:`qaroma.benchmarks.scorers`.
        scorer: ``generation`` or ``likelihood``.

    Returns:
        ``tasks``: for each ``rows``, ``of`` (records in its file), ``chance`` (of a blind guess),
        ``accuracy`` and ``interval``; with generation also ``unparsed`` (texts that name no answer, which
        count as wrong), with likelihood also ``accuracy_per_token`` and ``interval_per_token``.
        ``mean_accuracy`` (and ``mean_accuracy_per_token``): the mean over tasks, each counted once.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in sets:
        records = [scored[task.name, question.row] for question in task.questions]
        figures = {
            "rows": len(records),
            "of": task.size,
            "chance": sum(1 / len(question.candidates) for question in task.questions) / len(records),
            **_accuracy(records, "predicted", ""),
        }
        if scorer == "generation":
            figures["unparsed"] = sum(record["predicted"] is None for record in records)
        else:
            figures |= _accuracy(records, "predicted_per_token", "_per_token")
        tasks[task.name] = figures
    means = {
        f"mean_{key}": sum(figures[key] for figures in tasks.values()) / len(tasks)
        for key in ("accuracy", "accuracy_per_token")
        if all(key in figures for figures in tasks.values())
    }
    return {"tasks": tasks, **means}


def results_table(figures: Mapping[str, Any]) -> Table:
    """What :func:`summarise` gave, with ``scorer`` and ``model``, as a table for people."""
    tasks = figures["tasks"]
    measures = ["", "_per_token"] if figures["scorer"] == "likelihood" else [""]
    names = {"": "summed" if len(measures) > 1 else "accuracy", "_per_token": "per token"}
    cut = [task for task in tasks.values() if task["rows"] < task["of"]]
    table = Table(
        title=f"commonsense, {figures['scorer']}: {figures['model']}",
        caption=f"only a part of {len(cut)} test sets was scored" if cut else None,
    )
    table.add_column("task", no_wrap=True)
    for heading in ("rows", "chance", *(f"{names[m]} (95 %)" for m in measures)):
        table.add_column(heading, justify="right")
    if figures["scorer"] == "generation":
        table.add_column("unparsed", justify="right")
    for name, task in tasks.items():
        shown = [_percent(task[f"accuracy{m}"], *task[f"interval{m}"]) for m in measures]
        unparsed = [str(task["unparsed"])] if "unparsed" in task else []
        table.add_row(name, str(task["rows"]), f"{100 * task['chance']:.1f}", *shown, *unparsed)
    table.add_section()
    table.add_row(f"mean of {len(tasks)}", "", "", *(f"{100 * figures[f'mean_accuracy{m}']:.2f}" for m in measures))
    return table


def _accuracy(records: Sequence[Mapping[str, Any]], key: str, suffix: str) -> dict[str, Any]:
    correct = sum(record[key] == record["answer"] for record in records)
    return {
        f"accuracy{suffix}": correct / len(records),
        f"interval{suffix}": list(wilson(correct, len(records))),
    }


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.2f}  ({100 * low:.1f} - {100 * high:.1f})"
