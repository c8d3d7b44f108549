"""One cell carried out: the product's presets, adapter and method on a bed, in a plain loop."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qaroma.compare.specs import parse_spec
from qaroma.compare.suite.beds import ENOUGH, Bed, Place
from qaroma.compare.suite.bench import Bench
from qaroma.compare.suite.cells import Cell, Figures
from qaroma.config.load import read_settings
from qaroma.config.presets import resolve
from qaroma.config.resolved import ResolvedConfig
from qaroma.method.base import Method
from qaroma.method.factors import Factors, Update
from qaroma.method.head import TrainedHead
from qaroma.method.spectrum import effective_rank
from qaroma.training.choice import Choice
from qaroma.training.setup import build_method
from qaroma.training.trimming import trim_method

_SET_UP = {
    "text": "bytebeds.set_up_text",
    "ladder": "bytebeds.set_up_ladder",
    "planted": "planted.set_up_planted",
    "labelled": "modelbeds.set_up_model",
    "language": "modelbeds.set_up_model",
}


def set_up(bed: Bed, place: Place, seed: int) -> Bench:
    """A fresh model with a bed's data; the module of its kind is imported now."""
    module, _, function = _SET_UP[bed.kind].partition(".")
    bench: Bench = getattr(importlib.import_module(f"qaroma.compare.suite.{module}"), function)(bed, place, seed)
    return bench


def configure(bed: Bed, bench: Bench, cell: Cell) -> ResolvedConfig:
    """The resolved configuration of a cell: the presets decide all that the bed and the arm do not say."""
    sets = parse_spec(cell.arm, 8).sets
    flags: dict[str, Any] = {
        "model.name": bed.name,
        "data.train": [bed.name],
        "data.max_length": bench.facts.model_max_length,
        "task": bed.task,
        "training.max_steps": bed.steps,
        "training.micro_batch": bed.batch,
        "training.grad_accum": 1,
        "training.seed": cell.seed,
        "training.learning_rate": cell.rate,
    }
    resolved, _ = resolve(read_settings(None, flags, sets), bench.facts)
    if cell.factor != 1.0:
        flags["training.learning_rate"] = cell.factor * resolved.training.learning_rate
        resolved, _ = resolve(read_settings(None, flags, sets), bench.facts)
    return resolved


@dataclass(frozen=True)
class Kept:
    """A trained state that can be gone back to once training is over."""

    factors: Update
    components: Mapping[str, list[int]]
    head: Mapping[str, Tensor]


@dataclass
class Trial:
    """A bed, set up, with the method that trains it."""

    bed: Bed
    bench: Bench
    config: ResolvedConfig
    method: Method
    head: TrainedHead | None

    def kept(self) -> Kept:
        """A copy of what is trained."""
        factors = {name: Factors(A.clone(), B.clone()) for name, (A, B) in self.method.factors().items()}
        components = {name: list(parts) for name, parts in self.method.components().items()}
        return Kept(factors, components, self.head.tensors() if self.head else {})

    def go_back(self, kept: Kept) -> None:
        """Take such a copy; the method has finished."""
        self.method.load_factors(kept.factors, kept.components)
        if self.head:
            self.head.load(kept.head)


def prepare(cell: Cell, bed: Bed, place: Place) -> Trial:
    """A trial before its first step."""
    bench = set_up(bed, place, cell.seed)
    config = configure(bed, bench, cell)
    torch.manual_seed(cell.seed)
    return Trial(bed, bench, config, *build_method(config, bench.model, bench.head))


@dataclass
class Course:
    """What happened while a trial trained. Times are seconds of this process's CPU.

    Attributes:
        gradients, updates: seconds of forward and backward passes, and of the method's steps.
        plain_updates: seconds of each step of the method in which nothing grew.
        grown_updates: of those in which something grew.
        trainable: parameters that trained, step by step.
        validations: (step, loss).
        choice: what they have chosen.
        best: adapter and head of it, None where none was taken.
        rank_sum: mean rank of a module, summed over steps.
        enough_step: at which a rung of the ladder was found to be learnt.
    """

    steps: int = 0
    ended: str = "budget"
    gradients: float = 0.0
    plain_updates: list[float] = field(default_factory=list)
    grown_updates: list[float] = field(default_factory=list)
    trainable: list[int] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)
    best: Kept | None = None
    rank_sum: float = 0.0
    enough_step: int | None = None

    @property
    def seconds(self) -> float:
        """Of training alone: validation and scoring are left out."""
        return self.gradients + sum(self.plain_updates) + sum(self.grown_updates)

    @property
    def growth_share(self) -> float:
        """What steps that grow take beyond the others, as a share of the run."""
        plain = sorted(self.plain_updates)[len(self.plain_updates) // 2] if self.plain_updates else 0.0
        return sum(max(0.0, seconds - plain) for seconds in self.grown_updates) / max(self.seconds, 1e-9)


def train_step(trial: Trial, course: Course) -> float:
    """One optimiser step and what grows after it; returns the loss before it."""
    bench, method = trial.bench, trial.method
    while method.probing:
        start = time.process_time()
        bench.loss(course.steps).backward()  # type: ignore[no-untyped-call]
        method.probe()
        course.gradients += time.process_time() - start
    start = time.process_time()
    loss = bench.loss(course.steps)
    loss.backward()  # type: ignore[no-untyped-call]
    value = loss.item()
    between = time.process_time()
    events = method.step(value)
    (course.grown_updates if events else course.plain_updates).append(time.process_time() - between)
    course.gradients += between - start
    course.steps += 1
    course.trainable.append(method.trainable_parameters())
    ranks = method.ranks().values()
    course.rank_sum += sum(ranks) / len(ranks)
    return value


def train(trial: Trial, *, validates: bool) -> Course:
    """Train to the budget, to the end of growth, to the end of patience, or until the loss is no number.

    Args:
        trial: as prepared. On a ladder, what does not validate stops where it has learnt enough.
        validates: whether to look at the validation rows on the way, as the product does.
    """
    bed, bench, method = trial.bed, trial.bench, trial.method
    every = trial.config.training.evaluate_every
    course = Course()
    bench.model.train()
    while course.steps < bed.steps and not method.finished:
        if not math.isfinite(train_step(trial, course)):
            course.ended = "diverged"
            return course
        last = course.steps == bed.steps or method.finished
        if course.steps % every and not last:
            continue
        if bed.kind == "ladder" and course.enough_step is None and bench.score() >= ENOUGH:
            course.enough_step = course.steps
            if not validates:
                course.ended = "enough"
                break
        if validates and _out_of_patience(trial, course):
            course.ended = "patience"
            break
    if method.finished:
        course.ended = method.ending
    method.finish()
    return course


def _out_of_patience(trial: Trial, course: Course) -> bool:
    """Look at the validation rows and keep what they choose; whether the run should end."""
    figures, metric = trial.bench.validate(), trial.bench.metric
    course.validations.append((course.steps, figures["loss"]))
    trial.method.validated(figures["loss"], figures["loss_error"])
    if course.choice.observe(metric, figures, step=course.steps, done=course.steps / trial.bed.steps):
        course.best = trial.kept()
    patience = trial.config.training.patience
    return bool(patience) and course.choice.without_gain >= patience


def carry_out(cell: Cell, bed: Bed, place: Place) -> Figures:
    """Train and score one cell.

    Returns:
        ``score`` after the last step and ``score_best`` with what validation liked best and trimming left of it (the
        same where nothing was validated), None where the run diverged; ranks and parameters of that, CPU seconds, and
        how it ended.
    """
    trial = prepare(cell, bed, place)
    method, rate = trial.method, trial.config.training.learning_rate
    start = method.trainable_parameters()
    course = train(trial, validates=cell.grows)
    if course.ended == "diverged":
        return {"score": None, "score_best": None, "ended": "diverged", "steps": course.steps, "rate": rate}
    score = trial.bench.score()
    if course.best is None:
        chosen = score
    else:
        trial.go_back(course.best)
        trim_method(
            method,
            trial.config.growth,
            trial.bench.validate,
            metric=trial.bench.metric,
            best=course.choice.best,
        )
        chosen = trial.bench.score()
    figures = _figures(method, course, start) | trial.bench.learnt(method.factors())
    return {**figures, "rate": rate, "score": score, "score_best": chosen}


def _figures(method: Method, course: Course, start: int) -> Figures:
    ranks = list(method.ranks().values())
    effective = [effective_rank(A, B) if len(A) else 0.0 for A, B in method.factors().values()]
    total = sum(ranks)
    stored = sum(A.numel() + B.numel() for A, B in method.factors().values())
    return {
        "ended": course.ended,
        "steps": course.steps,
        "enough_step": course.enough_step,
        "rank": total / len(ranks),
        "rank_over_steps": course.rank_sum / max(course.steps, 1),
        "rank_of_modules": list(ranks),
        "effective_share": sum(effective) / total if total else None,
        "parameters": stored,
        "trainable_start": start,
        "trainable_mean": sum(course.trainable) / max(len(course.trainable), 1),
        "trainable_most": max([start, *course.trainable]),
        "trainable_end": course.trainable[-1] if course.trainable else start,
        "seconds": course.seconds,
        "gradient_seconds": course.gradients,
        "growth_share": course.growth_share,
        "validations": course.validations,
    }
