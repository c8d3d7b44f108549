"""Values that a run decides for itself, each with the reason that is printed beside it.

``auto`` scales the paper's proportions to the data: a file of 1,000 rows is some hundred steps, in
which the paper's inner loop of 1,000 would never end. ``paper`` is its table for LLaMA3-8B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qaroma.config import Config, GrowthSection
from qaroma.errors import QaromaError
from qaroma.method.growth import GrowthSettings

EPOCHS = 3.0
MIN_STEPS, MAX_EPOCHS = 60, 20  # a small file is repeated until it is worth growing on
COMPONENTS = 4  # inner loops that the step budget holds
MAX_LENGTH = 2048

# METHOD, "Published hyper-parameters", LLaMA3-8B Commonsense170K: by inner rank.
PAPER = {
    1: {"alpha": 2.0, "t_in": 1000, "eps_out": 1e-3, "steps": 100_000},
    8: {"alpha": 16.0, "t_in": 2000, "eps_out": 1e-2, "steps": 80_000},
}
PAPER_MODULES = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class DataFacts:
    """What the data says.

    Number of training rows, lengths of all rows in tokens, the model's longest input, number of validation rows.
    """

    rows: int
    lengths: Sequence[int]
    model_max_length: int | None
    validation_rows: int = 0


@dataclass(frozen=True)
class Decision:
    """One resolved value: dotted key, value, and why."""

    key: str
    value: Any
    reason: str


def resolve(config: Config, facts: DataFacts) -> tuple[Config, list[Decision]]:
    """Fill in every ``None`` of a configuration.

    Args:
        config: as the user gave it; not changed.
        facts: of the encoded data.

    Returns:
        The resolved configuration, and what was decided, in the order to print it.

    Raises:
        QaromaError: settings that contradict each other.
    """
    resolved = config.model_copy(deep=True)
    decisions: list[Decision] = []

    def decide(key: str, value: Any, reason: str) -> None:
        section_name, _, name = key.partition(".")
        section = getattr(resolved, section_name)
        if getattr(section, name) is None:
            setattr(section, name, value)
            decisions.append(Decision(key, value, reason))

    _decide_length(resolved, facts, decide)
    if config.data.packing:
        facts = _packed(facts, resolved.data.max_length or MAX_LENGTH)
    _decide_steps(resolved, facts, decide)
    steps = resolved.training.max_steps
    assert steps is not None
    if config.method == "lora":
        _decide_lora(resolved, steps, decide)
    elif config.growth.preset == "paper":
        _decide_paper(resolved, steps, decide)
    else:
        _decide_auto(resolved, steps, decide)
    tenth = max(1, round(steps / 10))
    batch = config.training.micro_batch * config.training.grad_accum
    # A validation row costs a third of a training row: forward only.
    affordable = min(steps, math.ceil(2 * facts.validation_rows / batch))
    reason = "a tenth of the run" if tenth >= affordable else "keeps validation to a seventh of the time"
    decide("training.evaluate_every", max(tenth, affordable), reason)
    decide("checkpoint.every", tenth, "a tenth of the run")
    if config.method == "aroma":
        growth_settings(resolved.growth)
    return resolved, decisions


def growth_settings(growth: GrowthSection) -> GrowthSettings:
    """The resolved section as the method takes it.

    Raises:
        QaromaError: settings that contradict each other.
    """
    names = GrowthSettings.__dataclass_fields__
    try:
        return GrowthSettings(**{name: value for name, value in growth.model_dump().items() if name in names})
    except ValueError as error:
        raise QaromaError(f"{error}; change growth.t_in or the warm-ups, or leave them to the preset") from error


def _decide_length(config: Config, facts: DataFacts, decide: Any) -> None:
    """The smallest multiple of 64 that holds 99 % of the examples, within the model and 2,048."""
    ordered = sorted(facts.lengths)
    needed = ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 64
    bound = min(MAX_LENGTH, facts.model_max_length or MAX_LENGTH)
    if config.data.packing:
        decide("data.max_length", bound, "packing fills rows of any length: the longest within bounds")
    value = min(max(64, math.ceil(needed / 64) * 64), bound)
    decide("data.max_length", value, f"99 % of the examples have at most {needed} tokens (bound {bound})")


def _packed(facts: DataFacts, max_length: int) -> DataFacts:
    """The facts of rows that are packed full: as many as their tokens fill."""
    share = facts.rows / max(len(facts.lengths), 1)
    return replace(facts, rows=max(1, math.ceil(share * sum(facts.lengths) / max_length)))


def _decide_steps(config: Config, facts: DataFacts, decide: Any) -> None:
    batch = config.training.micro_batch * config.training.grad_accum
    per_epoch = max(1, math.ceil(facts.rows / batch))
    if config.training.max_steps is not None:
        return
    epochs = config.training.epochs
    if epochs is not None:
        decide("training.max_steps", math.ceil(epochs * per_epoch), f"{epochs:g} epochs of {per_epoch} steps")
        return
    if config.growth.preset == "paper" and config.method == "aroma":
        published = PAPER[8 if config.growth.inner_rank == 8 else 1]["steps"]
        decide("training.max_steps", int(published), "published step budget")
        return
    steps = math.ceil(EPOCHS * facts.rows / batch)
    reason = f"{EPOCHS:g} epochs of {facts.rows} rows, {batch} a step"
    if steps < MIN_STEPS:
        steps = min(MIN_STEPS, MAX_EPOCHS * per_epoch)
        reason = f"{facts.rows} rows are few: {steps / per_epoch:.0f} epochs"
    decide("training.max_steps", steps, reason)


def _decide_auto(config: Config, steps: int, decide: Any) -> None:
    growth = config.growth
    decide("growth.target_modules", "all-linear", "every linear layer but the head")
    decide("growth.inner_rank", 1, "rank-one components")
    inner_rank = growth.inner_rank or 1
    decide("growth.alpha", 2.0 * inner_rank, "2 x inner rank, as the paper for LLaMA")
    longest = min(1000, max(2, round(steps / COMPONENTS)))
    decide("growth.t_in", longest, f"{COMPONENTS} inner loops in {steps} steps, at most 1000")
    t_in = growth.t_in or 1
    decide("growth.warmup", min(100, t_in // 10), "a tenth of t_in, at most 100")
    decide("growth.restart_warmup", min(50, t_in // 10), "a tenth of t_in, at most 50")
    decide("growth.check_every", min(10, max(1, t_in // 8)), "eight checks in an inner loop, at least every 10 steps")
    rate = float(f"{min(1e-2, max(1e-4, 0.4 / t_in)):.1e}")
    decide("training.learning_rate", rate, "0.4 / t_in, within 1e-4 .. 1e-2: a short inner loop needs larger steps")
    rate = config.training.learning_rate or rate
    eps_out = float(f"{0.02 * rate * t_in:.1e}")
    decide("growth.eps_out", eps_out, "a fiftieth of learning rate x t_in, the most that one element can move")
    decide("growth.max_update", 1.0, "guards the steps after a reset")
    _decide_common(decide)


def _decide_paper(config: Config, steps: int, decide: Any) -> None:
    growth = config.growth
    decide("growth.target_modules", PAPER_MODULES, "paper, LLaMA3-8B")
    decide("growth.inner_rank", 1, "paper, LLaMA3-8B")
    published = PAPER[8 if growth.inner_rank == 8 else 1]
    decide("growth.alpha", published["alpha"], "paper, LLaMA3-8B")
    decide("growth.t_in", int(published["t_in"]), "paper, LLaMA3-8B")
    decide("growth.eps_out", published["eps_out"], "paper, LLaMA3-8B")
    decide("growth.warmup", 100, "paper")
    decide("growth.restart_warmup", 50, "paper")
    decide("growth.check_every", 10, "paper")
    decide("growth.dropout", 0.1, "paper")
    decide("training.learning_rate", 1e-4, "paper")
    _decide_common(decide)


def _decide_common(decide: Any) -> None:
    decide("growth.eps_in", 0.1, "paper")
    decide("growth.inner_criterion", "norm", "eq. 5")
    decide("growth.schedule", "lockstep", "paper")
    decide("growth.on_converged", "discard", "paper")
    decide("growth.reset", "prune", "paper")
    decide("growth.check_first", True, "Algorithm 1")
    decide("growth.dropout", 0.0, "one product for all components instead of two")
    decide("growth.min_lr_ratio", 0.1, "paper")


def _decide_lora(config: Config, steps: int, decide: Any) -> None:
    decide("growth.target_modules", "all-linear", "every linear layer but the head")
    decide("growth.alpha", 2.0 * config.rank, "2 x rank")
    decide("training.learning_rate", 2e-4, "usual for LoRA")
    decide("growth.warmup", min(100, steps // 20), "a twentieth of the run, at most 100")
    decide("growth.dropout", 0.0, "none")
    decide("growth.min_lr_ratio", 0.1, "as aroma's")
