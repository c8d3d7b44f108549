"""The presets of growth.

``auto`` grows within a budget: rank from what the data has to tell, the learning rate from the weights, both set
right while the run goes on. Where inner loops are asked for it scales the paper's proportions to the data.
``paper`` is the published table for LLaMA3-8B, or for RoBERTa-base where the task is one with labels. The methods
of fixed rank share a third one.
"""

from __future__ import annotations

from collections.abc import Callable

from qaroma.config.decisions import DataFacts, Decide
from qaroma.config.methods import METHODS
from qaroma.config.schema import Config
from qaroma.config.tasks import PREFERENCE
from qaroma.errors import QaromaError
from qaroma.method.rate import rate_for

PREFERENCE_RATE = 1 / 40  # of the rate that answers would have: 5e-6 where LoRA's is 2e-4, as is usual
COMPONENTS = 4  # inner loops that the step budget holds

# Growth within a budget. A trained number takes in about two thirds of a thousandth of a bit a step (measured: random
# pairs memorised by a byte-level model) and keeps two (Allen-Zhu & Li, 2024, "Physics of Language Models: Part 3.3").
STEPS_FOR_A_BIT = 1500.0
BITS_A_NUMBER = 2.0
BLOCK = 8  # the rank to begin with
SMALL_BUDGET, LARGE_BUDGET = 16, 32  # of rank: for data that a block takes in, and for more
TRIM = 0.03  # of the update's norm: a thousandth of its squares
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
    _decide_updates(config, decide)
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


def _decide_updates(config: Config, decide: Decide) -> None:
    """Whether the learning rate is measured, and the optimizer that goes with that."""
    if config.task == PREFERENCE:
        measured, why = False, "the rate that takes most off this loss leaves too little of the model"
    elif config.writes_text:
        measured, why = True, "training.learning_rate is where the measuring begins"
    else:  # MiniLM on SST-2: one run of three went to chance with a measured rate
        measured, why = False, "gradients of a new head are too noisy to measure by"
    if decide("growth.measured_rate", measured, why):
        decide("training.optimizer", "muon", "all directions of a layer's components learn alike")
    else:  # MiniLM on SST-2, one seed: 1.3 points lost by Muon
        decide("training.optimizer", "adamw", "the usual one, where the rate is not measured")


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
    return needed, f"rank {float(f'{needed:.2g}'):g} takes in {bits:,.0f} bits in {steps} steps"


def _decide_rate(config: Config, rate: float, reason: str, decide: Decide) -> float:
    """The learning rate, or of preferences a fortieth of it."""
    if config.task == PREFERENCE:
        rate, reason = PREFERENCE_RATE * rate, f"a fortieth of the rate for answers ({reason})"
    return float(decide("training.learning_rate", float(f"{rate:.1e}"), reason))


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
    decide("training.optimizer", "adamw", "as published")
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
    if decide("training.optimizer", "adamw", "usual for LoRA") == "muon" and not METHODS[config.method].ours:
        raise QaromaError(f"training.optimizer muon trains our own adapters, got method {config.method}; leave it out")
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
