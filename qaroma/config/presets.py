"""Values that a run decides for itself, each with the reason that is printed beside it.

``auto`` grows within a budget: rank from what the data has to tell, the learning rate from the weights, both set
right while the run goes on. Where inner loops are asked for it scales the paper's proportions to the data.
``paper`` is the published table for LLaMA3-8B, or for RoBERTa-base where the task is one with labels. The methods
of fixed rank share a third one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qaroma.config.growth_settings import growth_settings
from qaroma.config.methods import METHODS
from qaroma.config.schema import (
    BudgetGrowthSection,
    Config,
    GrowingSection,
    MeasuredGrowthSection,
    ResolvedConfig,
    ResolvedGrowthSection,
)
from qaroma.config.tasks import PREFERENCE, TaskName
from qaroma.errors import QaromaError
from qaroma.method.rate import rate_for

EPOCHS = 3.0
MIN_STEPS, MAX_EPOCHS = 60, 20  # a small file is repeated until it is worth growing on
# Of preferences: pairs that were seen before are soon told apart by heart, at the price of everything else.
PREFERENCE_EPOCHS, PREFERENCE_MAX_EPOCHS = 1.0, 3
PREFERENCE_RATE = 1 / 40  # of the rate that answers would have: 5e-6 where LoRA's is 2e-4, as is usual
COMPONENTS = 4  # inner loops that the step budget holds
MAX_LENGTH = 2048

# Growth within a budget. A trained number takes in about two thirds of a thousandth of a bit a step (measured: random
# pairs memorised by a byte-level model) and keeps two (Allen-Zhu & Li, 2024, "Physics of Language Models: Part 3.3"); a
# token that is trained on tells about three bits.
STEPS_FOR_A_BIT = 1500.0
BITS_A_NUMBER = 2.0
BITS_A_TOKEN = 3.0
TRIM = 0.03  # of the update's norm: a thousandth of its squares
BITS_A_PAIR = 1.0  # which of two answers is the better one
BLOCK = 8  # the rank to begin with
SMALL_BUDGET, LARGE_BUDGET = 16, 32  # of rank: for data that a block takes in, and for more
PATIENCE, FEWEST_PATIENCE = 0.3, 2  # of the validations that a run has; a single worse one may be chance
FEWEST_VALIDATION_ROWS = 16  # by which a run may be ended
FEW_VALIDATION_ROWS = 8  # of so many and fewer the loss says little
# Settings of the inner loops: whoever gives one of them wants these.
OF_LOOPS = ("t_in", "check_every", "eps_in", "eps_out", "inner_criterion", "outer_criterion", "init", "on_converged",
            "reset", "check_first", "restart_warmup")  # fmt: skip
OF_BUDGET = ("start_rank", "measured_rate", "trim")

# METHOD, "Published hyper-parameters", LLaMA3-8B Commonsense170K: by inner rank.
PAPER = {
    1: {"alpha": 2.0, "t_in": 1000, "eps_out": 1e-3, "steps": 100_000},
    8: {"alpha": 16.0, "t_in": 2000, "eps_out": 1e-2, "steps": 80_000},
}
PAPER_MODULES = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# RoBERTa-base on GLUE: what its tasks share, or most of them do; the rest is in configs/paper.
PAPER_ENCODER = {"alpha": 4.0, "t_in": 1000, "eps_out": 5e-3}

# Of the update made so far: a component of that size, orthogonal to it, makes it half a percent larger.
EPS_OUT_UPDATE = 0.1
# Criteria that ReLoRA does not have.
CRITERIA = ("growth.check_every", "growth.eps_in", "growth.eps_out", "growth.inner_criterion",
            "growth.outer_criterion", "growth.on_converged", "growth.check_first")  # fmt: skip

Decide = Callable[[str, Any, str], Any]  # key, value and reason; gives the value that stands


@dataclass(frozen=True)
class ModelFacts:
    """What the base says.

    Attributes:
        component_parameters: N + M of one rank-one component, summed over all adapted layers.
        width: N, the median over layers.
        weight_std: standard deviation of a layer's elements, the median over some layers.
    """

    component_parameters: int
    width: int
    weight_std: float


@dataclass(frozen=True)
class DataFacts:
    """What the data says, and the base that trains on it.

    Attributes:
        rows: to train on.
        lengths: of all rows, in tokens.
        model_max_length: the model's longest input, where it has one.
        validation_rows: to validate on.
        trained_bits: what the training rows have to tell, copies counted once; None where nobody counted.
        model: of the base; None where it has not been looked at, for all that does not depend on it.
    """

    rows: int
    lengths: Sequence[int]
    model_max_length: int | None
    validation_rows: int = 0
    trained_bits: float | None = None
    model: ModelFacts | None = None


@dataclass(frozen=True)
class Decision:
    """One resolved value: dotted key, value, and why."""

    key: str
    value: Any
    reason: str


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


def _decide_auto(config: Config, steps: int, facts: DataFacts, decide: Decide) -> None:
    """Growth within a budget, unless the method or a setting is one of inner loops."""
    decide("growth.target_modules", "all-linear", "every linear layer but the head")
    growth = config.growth
    loops = [f"growth.{name}" for name in OF_LOOPS if getattr(growth, name) is not None]
    loops += ["growth.inner_rank"] if growth.inner_rank not in (None, 1) else []
    budget = [f"growth.{name}" for name in OF_BUDGET if getattr(growth, name) is not None]
    if growth.schedule == "budget" and loops:
        raise QaromaError(
            f"{loops[0]} is a setting of inner loops, which schedule budget does not have; leave it out, or type "
            "--set growth.schedule=lockstep"
        )
    wanted = "lockstep" if loops or not METHODS[config.method].criteria else "budget"
    if budget and (growth.schedule or wanted) != "budget":
        raise QaromaError(
            f"{budget[0]} is a setting of growth within a budget, got growth.schedule={growth.schedule or wanted}"
            f"{f' because of {loops[0]}' if loops else ''}; leave one of them out"
        )
    why = f"{loops[0]} is one of inner loops" if loops else "rank where the loss falls too slowly"
    if decide("growth.schedule", wanted, why) == "budget":
        _decide_budget(config, steps, facts, decide)
    else:
        _decide_loops(config, steps, decide)


def _decide_budget(config: Config, steps: int, facts: DataFacts, decide: Decide) -> None:
    """Ranks from what the data has to tell, the rate from the weights."""
    decide("growth.inner_rank", 1, "rank-one components")
    alpha = decide("growth.alpha", 2.0, "the update is 2 B A")
    decide("growth.window", "all", "freezing the older components costs more than it saves")
    needed, told = _needed_rank(config, steps, facts)
    largest = LARGE_BUDGET if needed > BLOCK else SMALL_BUDGET
    largest = decide("growth.max_rank", largest, "twice the block, or four times it where the data fills the block")
    why = f"{told}; at least a block of {BLOCK}, which a run never does worse with, and at most half the budget"
    start = decide("growth.start_rank", max(1, min(max(BLOCK, round(needed)), largest // 2)), why)
    if config.task == PREFERENCE:
        decide("growth.measured_rate", False, "the rate that takes most off this loss leaves too little of the model")
    elif config.writes_text:
        decide("growth.measured_rate", True, "the rate below is where the measuring begins")
    else:  # MiniLM on SST-2: one run of three went to chance with a measured rate
        decide("growth.measured_rate", False, "gradients of a new head are too noisy to measure by")
    _decide_trim(config, decide)
    decide("growth.warmup", max(1, min(100, steps // 40)), "a fortieth of the run, at most 100: of every component")
    rate, why = 1e-3, "the base was not looked at"
    if facts.model is not None:
        width, std = facts.model.width, facts.model.weight_std
        rate = rate_for(steps=steps, width=width, weight_std=std, scale=alpha, rank=start)
        why = f"noise makes 2.5 % of weights of size {std:.2g} and width {width} in {steps} steps"
    rate = _decide_rate(config, rate, why, decide)
    if not config.writes_text:
        decide("training.head_learning_rate", min(rate, 1e-3), "the adapter's, at most 1e-3: the head is a full matrix")
    decide("growth.dropout", 0.0, "none")
    decide("growth.min_lr_ratio", 0.1, "the cosine ends at a tenth")


def _decide_trim(config: Config, decide: Decide) -> None:
    if config.model.adapter is None:
        decide("growth.trim", TRIM, "the smallest directions, a thousandth of the update's squares, are left out")
    elif decide("growth.trim", 0.0, "the adapter that it goes on from stays as it is"):
        raise QaromaError(
            f"growth.trim {config.growth.trim:g} would change the directions of {config.model.adapter}, which the run "
            "goes on from; leave it out"
        )


def _needed_rank(config: Config, steps: int, facts: DataFacts) -> tuple[float, str]:
    """The rank that takes in what the data has to tell, and that in words; a block where nobody counted."""
    if facts.model is None or facts.trained_bits is None:
        return float(BLOCK), f"a block of {BLOCK}"
    examples = steps * config.training.micro_batch * config.training.grad_accum
    bits = facts.trained_bits * min(1.0, examples / max(facts.rows, 1))
    needed = bits * max(STEPS_FOR_A_BIT / steps, 1 / BITS_A_NUMBER) / facts.model.component_parameters
    return needed, f"rank {needed:.2g} takes in {bits:,.0f} bits in {steps} steps"


def _decide_rate(config: Config, rate: float, reason: str, decide: Decide) -> float:
    """The learning rate, or of preferences a fortieth of it."""
    if config.task == PREFERENCE:
        rate, reason = PREFERENCE_RATE * rate, f"a fortieth of the rate for answers ({reason})"
    return float(decide("training.learning_rate", float(f"{rate:.1e}"), reason))


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


def _decide_loops(config: Config, steps: int, decide: Decide) -> None:
    """The paper's proportions, scaled to the data: 1,000 rows are some hundred steps."""
    decide("growth.window", 1, "the newest component trains, the older ones are frozen")
    inner_rank = decide("growth.inner_rank", 1, "rank-one components")
    decide("growth.alpha", 2.0 * inner_rank, "the update is 2 B A")
    longest = min(1000, max(2, round(steps / COMPONENTS)))
    t_in = decide("growth.t_in", longest, f"{COMPONENTS} inner loops in {steps} steps, at most 1000")
    decide("growth.warmup", min(100, t_in // 10), "a tenth of t_in, at most 100")
    decide("growth.restart_warmup", min(50, t_in // 10), "a tenth of t_in, at most 50")
    decide("growth.check_every", min(10, max(1, t_in // 8)), "eight checks in an inner loop, at least every 10 steps")
    rate = min(1e-2, max(1e-4, 0.12 / t_in))
    reason = "0.12 / t_in, within 1e-4 .. 1e-2: a short inner loop needs larger steps"
    rate = _decide_rate(config, rate, reason, decide)
    if not config.writes_text:
        decide("training.head_learning_rate", min(rate, 1e-3), "the adapter's, at most 1e-3: the head is a full matrix")
    eps_out = float(f"{0.02 * rate * t_in:.1e}")
    _decide_outer(eps_out, "a fiftieth of learning rate x t_in, the most that one element can move", decide)
    decide("growth.max_update", 1.0, "guards the steps after a reset")
    _decide_common(decide)


def _decide_paper(config: Config, steps: int, facts: DataFacts, decide: Decide) -> None:
    llama = config.writes_text
    model = "as published for LLaMA3-8B" if llama else "as published for RoBERTa-base"
    modules = (PAPER_MODULES, model) if llama else ("all-linear", "all of an encoder's")
    decide("growth.target_modules", *modules)
    decide("growth.window", 1, "the newest component trains, the older ones are frozen")
    inner_rank = decide("growth.inner_rank", 1, model)
    published = PAPER[8 if inner_rank == 8 else 1] if llama else PAPER_ENCODER
    decide("growth.alpha", published["alpha"] if llama else published["alpha"] * inner_rank, model)
    decide("growth.t_in", int(published["t_in"]), model)
    _decide_outer(published["eps_out"], model, decide)
    decide("growth.warmup", 100, "as published")
    decide("growth.restart_warmup", 50, "as published")
    decide("growth.check_every", 10, "as published")
    decide("growth.dropout", 0.1, "as published")
    _decide_head_rate(config, decide("training.learning_rate", 1e-4, "as published"), decide)
    _decide_common(decide)


def _decide_outer(eps_out: float, reason: str, decide: Decide) -> None:
    """The outer criterion and its bound, which is ``eps_out`` as a share of the weight."""
    if decide("growth.outer_criterion", "weight", "a component is measured beside its layer's weight") == "update":
        eps_out, reason = EPS_OUT_UPDATE, "a tenth of the update so far: one more makes it half a percent larger"
    decide("growth.eps_out", eps_out, reason)


def _decide_head_rate(config: Config, rate: float, decide: Decide) -> None:
    if not config.writes_text:
        decide("training.head_learning_rate", rate, "the adapter's")


def _decide_common(decide: Decide) -> None:
    decide("growth.eps_in", 0.1, "a component whose size changes by less has converged")
    decide("growth.inner_criterion", "norm", "the size of a component tells whether it still changes")
    decide("growth.init", "kaiming", "random A: no pass beside the steps")
    decide("growth.schedule", "lockstep", "all layers begin a component together")
    decide("growth.on_converged", "discard", "a component that is too small to help is dropped")
    decide("growth.reset", "prune", "moments of older components would lead a new one astray")
    decide("growth.check_first", True, "a layer that needs nothing gets nothing")
    decide("growth.dropout", 0.0, "one product for all components instead of two")
    decide("growth.min_lr_ratio", 0.1, "the cosine ends at a tenth")


def _decide_fixed(config: Config, steps: int, facts: DataFacts, decide: Decide) -> None:
    """One rule for LoRA, PEFT's LoRA and AdaLoRA, so that what differs between them is the method."""
    decide("growth.target_modules", "all-linear", "every linear layer but the head")
    decide("growth.alpha", 2.0 * config.rank, "2 x rank")
    _decide_head_rate(config, _decide_rate(config, 2e-4, "usual for LoRA", decide), decide)
    decide("growth.warmup", min(100, steps // 20), "a twentieth of the run, at most 100")
    decide("growth.dropout", 0.0, "none")
    decide("growth.min_lr_ratio", 0.1, "as aroma's")


PRESETS: dict[str, Callable[[Config, int, DataFacts, Decide], None]] = {
    "auto": _decide_auto,
    "paper": _decide_paper,
    "fixed": _decide_fixed,
}
