"""What a run has learned, in one line of plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from qaroma.config.metrics import metric_facts
from qaroma.config.tasks import PREFERENCE
from qaroma.config.words import percent, rough_time
from qaroma.runs.figures import Figures, Validation, figures_of, validation_of
from qaroma.runs.reading import Run


@dataclass(frozen=True)
class Finding:
    """The first thing that is said of a run.

    Attributes:
        headline: what it learned, and in what time.
        note: what was measured, as sentences.
        better: whether it is better than the base; None where nothing says so.
    """

    headline: str
    note: str
    better: bool | None


def finding(run: Run) -> Finding:
    """What is known of a run, finished or not: of exact answers first, then of validations, then of its training."""
    figures = figures_of(run)
    judged = validation_of(run, run.metric)
    told = _exact_answers(run, figures)
    if told is None and judged is not None and judged.best_step:
        told = _preference(run, judged) if run.task == PREFERENCE else _judged(run, judged)
    told = told or _training_loss(run)
    if told is None:
        return Finding("Nothing is learned yet", "No step has been logged.", None)
    cost = _cost(run, figures, "in" if told.better else "after")
    return replace(told, headline=told.headline + cost, note=told.note + _unchanged(figures))


def _exact_answers(run: Run, figures: Figures) -> Finding | None:
    """Where the test of answers came out otherwise than before, or was not made before."""
    before, after = figures.exact_match_before, figures.exact_match
    if after is None or before == after:
        return None
    source = Path(str(run.setting("evaluation.data") or "a test")).name
    rows = len(run.answers[-1]["prompts"])
    note = f"{rows:,} requests of {source}; an answer is right when it is exactly the expected one."
    if before is None:
        return Finding(f"{percent(after)} right", note, None)
    return Finding(f"{percent(before)} to {percent(after)} right", note, after > before)


def _preference(run: Run, judged: Validation) -> Finding | None:
    """How often the chosen answer gained more; the base is its own measure, so there is no figure before."""
    pairs = validation_of(run, "accuracy")
    if pairs is None:
        return _judged(run, judged)
    better = judged.before is None or metric_facts(judged.name).better(judged.best, judged.before)
    note = "Of the pairs held out, those whose chosen answer has become likelier against the rejected one."
    return Finding(f"{percent(pairs.best)} of pairs the right way round", note, better)


def _judged(run: Run, judged: Validation) -> Finding:
    """The metric that chose the adapter, before training and at its best."""
    facts, name = metric_facts(judged.name), judged.name.replace("_", " ")
    if judged.before is None:
        return Finding(f"Validation {name} {judged.best:.3g}", "It was not measured before training.", None)
    course = f"Validation {name} {judged.before:.4g} before training, {judged.best:.4g} at step {judged.best_step:,}."
    if not facts.better(judged.best, judged.before):
        return Finding("No better than the base", course, False)
    if judged.name == "accuracy":
        return Finding(f"{percent(judged.before)} to {percent(judged.best)} of labels right", course, True)
    if judged.name == "loss" and run.task == "causal-lm":
        before, best = (percent(math.exp(-max(loss, 0.0))) for loss in (judged.before, judged.best))
        meaning = "How sure it is of each right token of the rows held out (geometric mean)."
        return Finding(f"{before} to {best} sure of the next token", f"{meaning} {course}", True)
    return Finding(f"{name.capitalize()} {judged.before:.3g} to {judged.best:.3g}", course, True)


def _training_loss(run: Run) -> Finding | None:
    losses = run.series("loss").values
    if not losses:
        return None
    note = "Of the rows that it trains on: no validation says yet whether it learned more than these."
    return Finding(f"Training loss {losses[0]:.3g} to {losses[-1]:.3g}", note, None)


def _unchanged(figures: Figures) -> str:
    """A test of answers that came out as before is told too."""
    share = figures.exact_match
    same = share is not None and share == figures.exact_match_before
    return f" Exactly the expected answer: {percent(share or 0.0)} of requests, before and after." if same else ""


def _cost(run: Run, figures: Figures, word: str) -> str:
    if not run.finished or figures.seconds is None:
        return f" at step {run.step:,}" if run.step else ""
    device = run.device
    where = "" if device is None else " on a CPU" if device == "cpu" else " on a GPU"
    return f" {word} {rough_time(figures.seconds)}{where}"
