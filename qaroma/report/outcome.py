"""How a run ended, judged: of which step its adapter is, what came after that, and whether more would help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qaroma.config.metrics import Metric, metric_facts
from qaroma.runs.directory import RunDirectory
from qaroma.runs.figures import validation_of
from qaroma.runs.reading import Run

# What a last validation gains at least where a run still improves: of the figure, or of all that was gained.
_OF_FIGURE, _OF_GAIN = 0.01, 0.02

ENDINGS = {
    "grown": "every module has the rank it needs",
    "learnt": "the training rows are learnt",
    "budget": "the step budget is spent",
    "patience": "validation no longer improved",
}


@dataclass(frozen=True)
class Outcome:
    """What is said of a run that has ended.

    Attributes:
        verdict: the same in a few words.
        text: clauses, separated by semicolons.
        success: whether it ended because it was done, with nothing wasted and nothing left to gain.
        command: what goes on with a run that still improves; None for others.
    """

    verdict: str
    text: str
    success: bool
    command: str | None = None


def outcome(run: Run) -> Outcome:
    """Judge a finished run by its validations.

    A run that stopped by itself succeeded. One that spent its step budget succeeded where its last validation is
    its best, and hardly better than the one before.
    """
    facts, points = metric_facts(run.metric), run.validation(run.metric).points
    by_itself = run.ended not in (None, "budget")
    clauses = [ENDINGS[run.ended]] if run.ended in ENDINGS else []
    after = [point for point in points if point[0] > 0]
    if not after:
        clauses.append("nothing was validated, so nothing says whether it learnt more than its rows")
        return Outcome("It was not validated", "; ".join(clauses), by_itself)
    judged = validation_of(run, run.metric)
    assert judged is not None  # there are points
    step, best = judged.best_step, judged.best
    clauses.append(f"the adapter is of step {step:,}, the best by validation")
    helped = points[0][0] > 0 or facts.better(best, points[0][1])
    if not helped:
        clauses.append(f"no validation was better than the base's {run.metric} of {facts.text(points[0][1])}")
    wasted = run.step - step
    if wasted:
        last = f"{run.metric} {facts.text(best)} there, {facts.text(after[-1][1])} at the end"
        clauses.append(f"the {wasted:,} steps after it brought nothing ({last})")
    improving = not by_itself and not wasted and helped and _still_improves(facts, [value for _, value in points])
    if improving:
        clauses.append("still improving: more epochs would help")
    success = helped and (by_itself or not (wasted or improving))
    if not helped:
        verdict = "It never was better than the base"
    elif wasted:
        verdict = f"It was best at step {step:,}" + (", and stopped by itself" if by_itself else " and got no better")
    elif len(points) == 1:
        verdict = "It was validated only once"
    else:
        verdict = "It was still improving when it ended" if improving else "It was at its best when it ended"
    return Outcome(verdict, "; ".join(clauses), success, _longer(run) if improving else None)


def _still_improves(facts: Metric, values: Sequence[float]) -> bool:
    """Whether the last validation gained on the one before."""
    if len(values) < 2:
        return False
    before, last = values[-2:]
    least = min(_OF_FIGURE * abs(before), _OF_GAIN * abs(last - values[0]))
    return facts.better(last, before) and abs(last - before) > least


def _longer(run: Run) -> str:
    """The command that goes on for half as long again, a whole epoch at least."""
    command = RunDirectory(run.path).resume_command
    epochs = run.summary.get("epochs")
    if not isinstance(epochs, (int, float)):
        return f"{command} --max-steps {math.ceil(1.5 * run.step)}"
    return f"{command} --epochs {max(math.ceil(1.5 * epochs), math.floor(epochs) + 1)}"
