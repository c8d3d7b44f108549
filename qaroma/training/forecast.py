"""What a run will be, told before a weight is loaded: its data, its length and time, its memory, its room on the
disk."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from qaroma.config.decisions import Decision
from qaroma.config.levels import LEVELS
from qaroma.config.resolved import BudgetGrowthSection, GrowingSection, ResolvedConfig
from qaroma.config.schema import Config
from qaroma.config.words import file_size, memory_size, rough_time
from qaroma.errors import QaromaError
from qaroma.model.base import resolve_device
from qaroma.model.facts import component_parameters
from qaroma.plan.card import Card, this_card
from qaroma.plan.gpus import PCIE3_X8, SharedStep
from qaroma.plan.search import Planner
from qaroma.plan.shapes import plannable
from qaroma.runs.directory import RunDirectory
from qaroma.training.memory import choose_level, memory_bytes, step_memory, step_settings
from qaroma.training.prepare import PreparedData, prepare_data

# Bytes of a trained number in a checkpoint (the factor, two moments, the last update) and in an adapter.
_IN_CHECKPOINT, _IN_ADAPTER = 16, 4
_ADAPTERS = 3  # the best, the last, and one that is being written
_PAGES = 2 * 10**6  # log and report


@dataclass(frozen=True)
class Forecast:
    """What a run will be.

    Attributes:
        rows, validation_rows: trained on, and validated on.
        steps: at most.
        step_rows: rows of a step.
        epochs: times through the rows, at most.
        seconds: of all these steps on one card, by arithmetic; None where nothing is known before the second step.
        card: the one that is meant; None where it is none of those that are known.
        level: memory level.
        device: kind of device that it trains on.
        memory_bytes: of the largest step, on the CPU with the process's own.
        memory_counted: whether that was counted; otherwise a step takes less.
        disk_bytes: of the run directory, at most; the base's own files are not in it.
    """

    rows: int
    validation_rows: int
    steps: int
    step_rows: int
    epochs: float
    seconds: float | None
    card: str | None
    level: int
    device: str
    memory_bytes: int
    memory_counted: bool
    disk_bytes: int


def forecast(data: PreparedData) -> Forecast:
    """What the run of prepared data will be.

    Raises:
        QaromaError: no such device, or not even the smallest memory level fits it.
    """
    config, training = data.config, data.config.training
    device = resolve_device(training.device)
    planner = Planner(plannable(data.base))
    level = choose_level(config, data.base, device, planner)
    memory, counted = step_memory(config, data.base, device, planner, level)
    if device.type == "cpu":  # the libraries lie there too
        memory += memory_bytes(device)
    step_rows = training.micro_batch * training.grad_accum
    card = _known_card(device)
    return Forecast(
        rows=len(data.train),
        validation_rows=len(data.validation),
        steps=training.max_steps,
        step_rows=step_rows,
        epochs=training.max_steps / math.ceil(len(data.train) / step_rows),
        seconds=_seconds(data, device, planner, level, card) if card and config.writes_text else None,
        card=card.title if card else None,
        level=level,
        device=device.type,
        memory_bytes=memory,
        memory_counted=counted,
        disk_bytes=_disk(data),
    )


def _known_card(device: torch.device) -> Card | None:
    found = this_card() if device.type == "cuda" else None
    return found[1] if found else None


def _seconds(data: PreparedData, device: torch.device, planner: Planner, level: int, card: Card) -> float | None:
    """Of all steps, each with rows of mean length: those of a step are alike in length."""
    config, training = data.config, data.config.training
    length = math.ceil(fmean(example.tokens for example in data.train) / config.sequences)
    settings = replace(step_settings(config, data.base, device), level=level, seq_len=max(length, 2))
    try:
        step = planner.estimate(settings)
    except QaromaError:  # its steps depend on values, as no plan does: it trains all the same
        return None
    return training.max_steps * SharedStep(1, training.grad_accum, 0).seconds(step.work, card, PCIE3_X8)


def _disk(data: PreparedData) -> int:
    config = data.config
    parameters = component_parameters(data.base, config.growth.target_modules, task=config.task) * _most_rank(config)
    checkpoints = config.checkpoint.keep + 1  # one is written before the oldest goes
    return parameters * (_IN_CHECKPOINT * checkpoints + _IN_ADAPTER * _ADAPTERS) + _PAGES


def _most_rank(config: ResolvedConfig) -> int:
    """The mean rank that a run can end with."""
    growth = config.growth
    if isinstance(growth, GrowingSection) and not isinstance(growth, BudgetGrowthSection):
        most = growth.inner_rank * math.ceil(config.training.max_steps / growth.t_in)
        return min(most, growth.max_rank or most)
    return config.largest_training_rank


def tell(console: Console, data: PreparedData, told: Forecast, run: RunDirectory, *, verbose: bool) -> None:
    """Say what a run will be, in three lines; before them what is odd about its data.

    Args:
        console: where to.
        data, told, run: of the run.
        verbose: also every setting that was decided, with its reason.
    """
    if verbose:
        _print_decisions(console, data.decisions)
    for note in data.notes:
        console.print(note, highlight=False, markup=False)
    for name, sentence in sentences(data.config, told, run).items():
        console.print(f"{name:<13}{sentence}", highlight=False, markup=False, soft_wrap=not console.is_terminal)


def sentences(config: ResolvedConfig, told: Forecast, run: RunDirectory) -> dict[str, str]:
    """What it learns from, how long that is, and what it needs."""
    sources = ", ".join(Path(source.path).name for source in config.data.train)
    judged = f"; {told.validation_rows:,} others say whether it gets better" if told.validation_rows else ""
    times = f"{told.epochs:.0f} times" if told.epochs >= 2 else "once" if told.epochs >= 1 else "not even once"
    about = "about" if told.memory_counted else "less than"
    place = "the GPU's memory" if told.device == "cuda" else "memory"
    time = "said from the second step on"
    if told.seconds is not None:
        time = f"about {rough_time(told.seconds)} on one {told.card} by arithmetic, as measured {time}"
    return {
        "learns from": f"{told.rows:,} rows of {sources}{judged}",
        "takes": f"at most {told.steps:,} steps of {told.step_rows} rows, {times} through them; the time is {time}",
        "needs": f"{about} {memory_size(told.memory_bytes, 1)} of {place} (level {told.level}: "
        f"{LEVELS[told.level].summary}), at most {file_size(told.disk_bytes)} on the disk in {run.path.as_posix()}",
    }


def rehearse(config: Config, console: Console | None = None) -> dict[str, Any]:
    """All that is decided before a run, without one: no weight is loaded and nothing is written.

    Args:
        config: as :func:`qaroma.training.finetune.finetune` takes it.
        console: where it is said; None is stderr.

    Returns:
        The forecast, also in sentences, and the decisions, as ``--json`` prints them.

    Raises:
        QaromaError: whatever would stop the run before its first step.
    """
    data = prepare_data(config)
    told, run = forecast(data), RunDirectory.of(data.config)
    tell(console or Console(file=sys.stderr), data, told, run, verbose=True)
    decisions = [asdict(decision) for decision in data.decisions]
    return {
        "run": run.path.as_posix(),
        **asdict(told),
        "sentences": sentences(data.config, told, run),
        "notes": data.notes,
        "decisions": decisions,
    }


def _print_decisions(console: Console, decisions: Sequence[Decision]) -> None:
    width = max((len(d.key) for d in decisions), default=0)
    for d in decisions:
        value = f"{d.value:g}" if isinstance(d.value, float) else str(d.value)
        console.print(f"{d.key:<{width}}  {value:<10}  {d.reason}", highlight=False, markup=False, soft_wrap=True)
