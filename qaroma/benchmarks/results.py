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
        ``tasks``: for each ``rows``, ``of`` (records there are), ``metrics`` (by name, as "acc,none": ``value`` and
        ``interval``, its 95 % interval, None where the harness gives no error) and ``unparsed`` (generated texts in
        which no answer was found, which count as wrong). ``groups``: for each its metrics' means over its tasks.
    """
    tasks = {}
    for task, samples in found["samples"].items():
        sizes = found["n-samples"][task]
        tasks[task] = {
            "rows": sizes["effective"],
            "of": sizes["original"],
            "metrics": {
                name: {"value": value, "interval": _interval(name, value, found["results"][task], samples)}
                for name, value in _metrics(found["results"][task]).items()
            },
            "unparsed": sum(sample["filtered_resps"] == [_UNPARSED] for sample in samples),
        }
    return {"tasks": tasks, "groups": {group: _metrics(found["results"].get(group, {})) for group in groups}}


def results_table(figures: Mapping[str, Any]) -> Table:
    """What :func:`summarise` gave, with ``model``, as a table for people."""
    tasks = figures["tasks"]
    cut = sum(task["rows"] < task["of"] for task in tasks.values())
    table = Table(title=str(figures["model"]), caption=f"only a part of {cut} test sets was scored" if cut else None)
    table.add_column("task", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("metric")
    table.add_column("value (95 %)", justify="right")
    table.add_column("unparsed", justify="right")
    for name, task in tasks.items():
        first = (name, str(task["rows"]))
        for metric, figure in task["metrics"].items():
            table.add_row(*first, metric.removesuffix(",none"), _shown(**figure), str(task["unparsed"] or ""))
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


def _interval(
    name: str, value: float, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[float] | None:
    """Wilson's of a share of right answers, else 1.96 of the harness's standard errors on both sides."""
    metric, filtered = name.split(",", 1)
    scores = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
    if scores and all(isinstance(score, (int, float)) and score in (0, 1) for score in scores):
        return list(wilson(sum(scores), len(scores)))
    error = results.get(f"{metric}_stderr,{filtered}")
    return [value - _Z95 * error, value + _Z95 * error] if isinstance(error, (int, float)) else None


def _shown(value: float, interval: Sequence[float] | None = None) -> str:
    """A share in per cent, anything else as it is."""
    factor = 100 if 0 <= value <= 1 else 1
    bounds = "" if interval is None else f"  ({factor * interval[0]:.1f} - {factor * interval[1]:.1f})"
    return f"{factor * value:.2f}{bounds}"
