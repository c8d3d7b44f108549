"""Values that a run decides for itself, each with the reason that is printed beside it.

Length, steps and patience follow the data; growth follows one of :data:`~qaroma.config.growth_presets.PRESETS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qaroma.config.decisions import DataFacts, Decide, Decision
from qaroma.config.growth_presets import CRITERIA, PAPER, PRESETS
from qaroma.config.growth_settings import growth_settings
from qaroma.config.methods import METHODS
from qaroma.config.resolved import (
    BudgetGrowthSection,
    GrowingSection,
    MeasuredGrowthSection,
    ResolvedConfig,
    ResolvedGrowthSection,
)
from qaroma.config.schema import Config
from qaroma.config.tasks import PREFERENCE, TaskName
from qaroma.errors import QaromaError

EPOCHS = 3.0
MIN_STEPS, MAX_EPOCHS = 60, 20  # a small file is repeated until it is worth growing on
# Of preferences: pairs that were seen before are soon told apart by heart, at the price of everything else.
PREFERENCE_EPOCHS, PREFERENCE_MAX_EPOCHS = 1.0, 3
MAX_LENGTH = 2048
BITS_A_TOKEN = 3.0  # that is trained on
BITS_A_PAIR = 1.0  # which of two answers is the better one
PATIENCE, FEWEST_PATIENCE = 0.3, 2  # of the validations that a run has; a single worse one may be chance
FEWEST_VALIDATION_ROWS = 16  # by which a run may be ended
FEW_VALIDATION_ROWS = 8  # of so many and fewer the loss says little


def resolve(config: Config, facts: DataFacts) -> tuple[ResolvedConfig, list[Decision]]:
    """Decide every setting that a configuration leaves open.

    Args:
        config: as the user gave it, a model and data named; not changed.
        facts: of the encoded data.

    Returns:
        The resolved configuration, and what was decided, in the order to print it.

    Raises:
        QaromaError: settings that contradict each other.
    """
    settled = config.model_copy(deep=True)
    decisions: list[Decision] = []
    method = METHODS[config.method]

    def decide(key: str, value: Any, reason: str) -> Any:
        section_name, _, name = key.partition(".")
        section = getattr(settled, section_name)
        given = getattr(section, name)
        if given is not None or (not method.criteria and key in CRITERIA):
            return given
        setattr(section, name, value)
        decisions.append(Decision(key, value, reason))
        return value

    if config.model.adapter is not None and not method.ours:
        raise QaromaError(
            f"got model.adapter with method {config.method}, which begins anew; type --method aroma or --method lora"
        )
    max_length = _decide_length(config, facts, decide)
    if config.data.packing:
        facts = _packed(facts, max_length)
    steps = _decide_steps(config, facts, decide)
    PRESETS[config.growth.preset if method.grows else "fixed"](settled, steps, facts, decide)
    tenth = max(1, round(steps / 10))
    batch = config.training.micro_batch * config.training.grad_accum
    # A validation row costs a third of a training row: forward only.
    affordable = min(steps, math.ceil(2 * facts.validation_rows / batch))
    reason = "a tenth of the run" if tenth >= affordable else "keeps validation to a seventh of the time"
    every = int(decide("training.evaluate_every", max(tenth, affordable), reason))
    decide("checkpoint.every", tenth, "a tenth of the run")
    _decide_patience(settled, steps // every, facts, decide)
    resolved = _as_resolved(settled)
    growth_settings(resolved.growth)
    return resolved, decisions


def _as_resolved(settled: Config) -> ResolvedConfig:
    """The type that says of a configuration that nothing is open."""
    method = METHODS[settled.method]
    kind: type[ResolvedGrowthSection] = GrowingSection if method.grows else ResolvedGrowthSection
    if method.criteria:
        kind = BudgetGrowthSection if settled.growth.schedule == "budget" else MeasuredGrowthSection
    values = settled.model_dump()
    return ResolvedConfig.model_validate({**values, "growth": kind.model_validate(values["growth"])})


def warm_up_notes(config: ResolvedConfig) -> list[str]:
    """A sentence, where the run is over before its learning rate has reached its peak."""
    warmup, steps = config.growth.warmup, config.training.max_steps
    if warmup <= steps:
        return []
    return [
        f"{steps} steps never leave the warm-up of {warmup}: the learning rate of {config.training.learning_rate:g} is "
        f"not reached; type --set growth.warmup={steps // 10}, or a larger --max-steps"
    ]


def validation_notes(rows: int) -> list[str]:
    """A sentence, where there are hardly any rows to validate on.

    Args:
        rows: to validate on.
    """
    if rows > FEW_VALIDATION_ROWS:
        return []
    if not rows:
        return ["no row is validated on: nothing will tell when the run gets worse; name some with --validation FILE"]
    return [f"{rows} rows to validate on are few: their loss says little; name more with --validation FILE"]


def _decide_length(config: Config, facts: DataFacts, decide: Decide) -> int:
    """The longest example: the smallest multiple of 64 that holds 99 % of the examples, within the model and 2,048."""
    ordered = sorted(facts.lengths)
    needed = ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 64
    bound = min(MAX_LENGTH, facts.model_max_length or MAX_LENGTH)
    value = min(max(64, math.ceil(needed / 64) * 64), bound)
    reason = f"99 % of the examples have at most {needed} tokens (bound {bound})"
    if config.data.packing:
        value, reason = bound, "packing fills rows of any length: the longest within bounds"
    return int(decide("data.max_length", value, reason))


def _packed(facts: DataFacts, max_length: int) -> DataFacts:
    """The facts of rows that are packed full: as many as their tokens fill."""
    share = facts.rows / max(len(facts.lengths), 1)
    return replace(facts, rows=max(1, math.ceil(share * sum(facts.lengths) / max_length)))


def told_bits(task: TaskName, examples: Sequence[Any]) -> float:
    """What examples of answers or preferences have to tell.

    Args:
        task: causal-lm or preference.
        examples: copies counted once.
    """
    if task == PREFERENCE:
        return BITS_A_PAIR * len(examples)
    return BITS_A_TOKEN * float(sum(example.trained for example in examples))


def _decide_steps(config: Config, facts: DataFacts, decide: Decide) -> int:
    """The step budget: as given, of the epochs, as published, or of the number of rows."""
    batch = config.training.micro_batch * config.training.grad_accum
    per_epoch = _steps_an_epoch(config, facts)
    epochs = config.training.epochs
    llama = config.task == "causal-lm" and METHODS[config.method].grows
    preference = config.task == PREFERENCE
    usual, most = (PREFERENCE_EPOCHS, PREFERENCE_MAX_EPOCHS) if preference else (EPOCHS, MAX_EPOCHS)
    steps = math.ceil(usual * facts.rows / batch)
    reason = f"{usual:g} epoch{'s' if usual > 1 else ''} of {facts.rows} rows, {batch} a step"
    if epochs is not None:
        steps, reason = math.ceil(epochs * per_epoch), f"{epochs:g} epochs of {per_epoch} steps"
    elif config.growth.preset == "paper" and llama:
        steps, reason = int(PAPER[8 if config.growth.inner_rank == 8 else 1]["steps"]), "the published number of steps"
    elif steps < MIN_STEPS:
        steps = min(MIN_STEPS, most * per_epoch)
        reason = f"{facts.rows} rows are few: {steps / per_epoch:.0f} epochs"
    return int(decide("training.max_steps", steps, reason))


def _steps_an_epoch(config: Config, facts: DataFacts) -> int:
    return max(1, math.ceil(facts.rows / (config.training.micro_batch * config.training.grad_accum)))


def _decide_patience(config: Config, planned: int, facts: DataFacts, decide: Decide) -> None:
    if config.growth.preset == "paper" or not METHODS[config.method].grows:
        decide("training.patience", 0, "the run has a length of its own")
    elif not config.writes_text:
        decide("training.patience", 0, "scores of labels rise and fall from one validation to the next")
    elif facts.validation_rows < FEWEST_VALIDATION_ROWS:
        decide("training.patience", 0, f"{facts.validation_rows} validation rows are too few to end a run by")
    else:
        value = max(FEWEST_PATIENCE, round(PATIENCE * planned))
        decide("training.patience", value, f"of {planned} validations, without a better one; the best adapter is kept")
