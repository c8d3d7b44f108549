"""From what the harness found to figures: each task's metrics with their intervals, and the groups' means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
_UNPARSED = "[invalid]"  # what the harness's filters make of a text in which they find no answer


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, within 0 and 1.

    Args:
        correct: successes.
        total: trials, at least one.
    """
    share, z2 = correct / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(found: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Figures of a call of the harness.

    Args:
        found: what ``lm_eval.evaluator.evaluate`` returned, with its samples.
        groups: the names of each group's members.

    Returns:
        ``tasks``: for each ``rows``, ``of`` (records there are) and ``metrics``, by name, as "acc,none": ``value``,
        ``interval`` (95 %; None where the harness gives no error) and ``unparsed`` (generated texts in which that
        metric's filter found no answer; they count as wrong). ``groups``: for each its metrics' means over its tasks.
    """
    tasks = {}
    for task, samples in found["samples"].items():
        results, sizes = found["results"][task], found["n-samples"][task]
        metrics = {name: _figure(name, value, results, samples) for name, value in _metrics(results).items()}
        tasks[task] = {"rows": sizes["effective"], "of": sizes["original"], "metrics": metrics}
    return {"tasks": tasks, "groups": {group: _metrics(found["results"].get(group, {})) for group in groups}}


def results_table(figures: Mapping[str, Any]) -> Table:
    """What :func:`summarise` gave, with ``model``, as a table for people."""
    tasks = figures["tasks"]
    cut = sum(task["rows"] < task["of"] for task in tasks.values())
    table = Table(title=str(figures["model"]), caption=f"only a part of {cut} test sets was scored" if cut else None)
    table.add_column("task", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("metric", overflow="fold")
    table.add_column("value (95 %)", justify="right", no_wrap=True)
    table.add_column("unparsed", justify="right")
    for name, task in tasks.items():
        first = (name, str(task["rows"]))
        for metric, figure in task["metrics"].items():
            shown = _shown(figure["value"], figure["interval"])
            table.add_row(*first, metric.removesuffix(",none"), shown, str(figure["unparsed"] or ""))
            first = ("", "")
    table.add_section()
    for group, metrics in figures["groups"].items():
        for metric, value in metrics.items():
            table.add_row(f"mean of {group}", "", metric.removesuffix(",none"), _shown(value))
    return table


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The harness's "metric,filter" entries that are figures; its errors and notes stand between them."""
    return {
        name: float(value)
        for name, value in results.items()
        if "," in name and "_stderr," not in name and isinstance(value, (int, float))
    }


def _figure(
    name: str, value: float, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A metric with its interval: Wilson's of a share of right answers, else 1.96 standard errors on both sides."""
    metric, filtered = name.split(",", 1)
    samples = [sample for sample in samples if sample["filter"] == filtered]
    scores = [sample[metric] for sample in samples if metric in sample]
    error = results.get(f"{metric}_stderr,{filtered}")
    interval = None
    if scores and all(isinstance(score, (int, float)) and score in (0, 1) for score in scores):
        interval = list(wilson(sum(scores), len(scores)))
    elif isinstance(error, (int, float)):
        interval = [value - _Z95 * error, value + _Z95 * error]
    unparsed = sum(sample["filtered_resps"] == [_UNPARSED] for sample in samples)
    return {"value": value, "interval": interval, "unparsed": unparsed}


def _shown(value: float, interval: Sequence[float] | None = None) -> str:
    """A share in per cent, anything else as it is."""
    factor = 100 if 0 <= value <= 1 else 1
    bounds = "" if interval is None else f"  ({factor * interval[0]:.1f} - {factor * interval[1]:.1f})"
    return f"{factor * value:.2f}{bounds}"
