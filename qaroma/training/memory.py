"""Memory of a run: how much it takes, which level fits, and what to do when none did."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console

from qaroma.config.levels import FRAGMENTS, LEVELS
from qaroma.config.resolved import ResolvedConfig
from qaroma.config.tasks import PREFERENCE
from qaroma.config.words import memory_size
from qaroma.engine.levels import apply_level
from qaroma.engine.no_memory import card_is_full
from qaroma.engine.streaming import bytes_of_layers
from qaroma.errors import QaromaError
from qaroma.model.attention import wants_repeated_keys
from qaroma.model.documents import head_size, one_kernel_for_all
from qaroma.model.found import FoundModel
from qaroma.model.precision import resolve_dtype
from qaroma.plan.search import Planner
from qaroma.plan.shapes import plannable
from qaroma.plan.trace import StepSettings
from qaroma.training.interruptions import card_words
from qaroma.training.session import Session

Result = TypeVar("Result")

SMALL_SHARE = 0.25  # of the free memory: below it nothing needs to be traced


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU, or the resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def memory_figures(device: torch.device) -> dict[str, int]:
    """What the log keeps of a step's memory; on a GPU beside what is allocated also what torch holds for it."""
    figures = {"memory_bytes": memory_bytes(device)}
    if device.type == "cuda":
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return figures


def forbid_spilling(device: torch.device) -> None:
    """Let torch take no more of a card than is free now where the driver would not refuse it.

    On Windows it moves what does not fit into the computer's memory, without a word, and a step takes minutes.
    """
    if device.type == "cuda" and sys.platform == "win32":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(free / total, device)


def free_bytes(device: torch.device) -> int:
    """Memory that a run may take: of the card, or of the host where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def others_hold(device: torch.device) -> str:
    """A hint at the other programs on a card, to end a sentence with; empty on the CPU."""
    return f". {card_words()}" if device.type == "cuda" else ""


def runs_out_of_memory(work: Callable[[], None]) -> bool:
    """Do something; whether memory did not suffice. What it held is gone by then, and can be given back."""
    try:
        work()
    except Exception as error:
        if not card_is_full(error):
            raise
        return True
    return False


def with_relief(session: Session, work: Callable[[], Result], what: str, console: Console) -> Result:
    """Do something that changes no state but the gradients; where memory does not suffice, save some and begin anew.

    Where one rank has no memory for it, ``work`` says so on all of them, and all save alike.

    Args:
        session: of the run; see :func:`relieve`.
        work: what is done.
        what: its name, to say so.
        console: where it is said.

    Raises:
        QaromaError: nothing is left to save.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not card_is_full(error):
                raise
            # Outside the except clause the failed work's tensors are gone, and can be given back.
        session.method.zero_grad()
        done = session.ranks.together(lambda: relieve(session))
        console.print(f"{what}: out of memory; {done}", style="yellow")


def relieve(session: Session) -> str:
    """After a step that did not fit: save memory, at an unchanged effective batch.

    First the levels that change no number, then smaller micro-batches, then the packed head, and the base streamed.

    Args:
        session: its level or its plan's micro-batch is changed.

    Returns:
        What was done, as a clause to print.

    Raises:
        QaromaError: nothing is left to save.
    """
    gc.collect()  # what was cut off may lie in circles of references
    if session.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    last = session.level + 1 == len(LEVELS)
    if (last or not LEVELS[session.level + 1].exact) and session.plan.micro_batch > 1:
        session.plan.micro_batch //= 2
        return f"going on with micro-batches of {session.plan.micro_batch}, the same effective batch"
    other_head = not last and LEVELS[session.level + 1].packed_head and not LEVELS[session.level].packed_head
    if other_head and session.config.task == PREFERENCE:
        raise QaromaError(
            f"out of memory at memory level {session.level} with one pair at a time; the next level has another head "
            f"than the one that the reference was computed with. Go on with a new one: {session.run.resume_command} "
            f"--memory {session.level + 1}"
        )
    if not last:
        if LEVELS[session.level + 1].streamed:
            _require_host_memory(session)
        session.level += 1
        enter_level(session.model, session.level, session.config)
        return f"going on at memory level {session.level} ({LEVELS[session.level].summary})"
    raise QaromaError(
        f"out of memory at the smallest memory level with one example at a time; type a smaller --max-length "
        f"(now {session.config.data.max_length}), or see what fits with: qaroma plan --model {session.base_name}"
        f"{others_hold(session.accelerator.device)}"
    )


def _require_host_memory(session: Session) -> None:
    """See to it that the host has room for the layers before they leave a card: a system that swaps ends the run.

    Raises:
        QaromaError: it has not.
    """
    free, needed = free_bytes(torch.device("cpu")), bytes_of_layers(session.model)
    if session.accelerator.device.type == "cuda" and free < needed:
        raise QaromaError(
            f"out of memory at level {session.level}, and the {memory_size(free)} of free host memory do not hold the "
            f"{memory_size(needed)} of layers that level {session.level + 1} keeps there; type a smaller --max-length "
            f"(now {session.config.data.max_length}), or end other programs and --resume"
        )


def enter_level(model: Any, level: int, config: ResolvedConfig) -> None:
    """Put a run's model into a memory level; a packed head is quantised as the base is, or in NF4."""
    quant_type = "nf4" if config.model.quantization == "none" else config.model.quantization
    apply_level(model, level, quant_type=quant_type, double_quantization=config.model.double_quantization)


def choose_level(config: ResolvedConfig, base: FoundModel, device: torch.device, planner: Planner | None = None) -> int:
    """The memory level of a run: the one that was typed, or the fastest that fits.

    A small model needs no look; for others a step is traced on fake tensors (seconds).

    Args:
        config: of the run.
        base: what its model was found to be.
        device: where it trains.
        planner: of the base, which keeps what it traces; None makes one.

    Raises:
        QaromaError: not even the smallest level fits.
    """
    asked = config.training.memory
    if asked != "auto":
        return int(asked)
    free = free_bytes(device)
    tokens = _step_tokens(config)
    bound = generous_bound(base.config.get_text_config(), tokens)
    if bound < SMALL_SHARE * free:
        return 0
    if not config.writes_text:  # the planner traces language models
        return 0 if bound < free else 1
    host = int(psutil.virtual_memory().available) if device.type == "cuda" else None
    planner = planner or Planner(plannable(base))
    level = planner.fastest_level(step_settings(config, base, device), free - FRAGMENTS, host)
    if level is None:
        raise QaromaError(
            f"{config.model.name} does not fit in {memory_size(free, 1)} with micro-batches of {tokens} tokens; type a "
            f"smaller --micro-batch or --max-length (qaroma plan --model {config.model.name} says what fits), or "
            f"--memory {len(LEVELS) - 1} to try all the same{others_hold(device)}"
        )
    return level


def step_memory(
    config: ResolvedConfig, base: FoundModel, device: torch.device, planner: Planner, level: int
) -> tuple[int, bool]:
    """Bytes of the largest step at a memory level, on the device (the host's too where that is the device).

    Args:
        config, base, device, planner: as :func:`choose_level` takes them.
        level: of the run.

    Returns:
        The bytes, and whether they were counted; otherwise the step takes less.
    """
    bound = generous_bound(base.config.get_text_config(), _step_tokens(config))
    if bound < SMALL_SHARE * free_bytes(device) or not config.writes_text:
        return bound, False
    step = planner.estimate(replace(step_settings(config, base, device), level=level))
    return step.peak + (step.host if device.type == "cpu" else 0), True


def _step_tokens(config: ResolvedConfig) -> int:
    """Tokens of a micro-batch, at most."""
    return config.training.micro_batch * config.sequences * config.data.max_length


def step_settings(config: ResolvedConfig, base: FoundModel, device: torch.device) -> StepSettings:
    """The step that a run makes, at level 0."""
    targets = config.growth.target_modules
    dtype = resolve_dtype(config.model.compute_dtype, device, base.config)
    fused = config.model.attention == "sdpa"
    return StepSettings(
        level=0,
        seq_len=config.data.max_length,
        micro_batch=config.training.micro_batch,
        sequences=config.sequences,
        inner_rank=config.largest_training_rank,
        optimizer=config.training.optimizer,
        targets=targets if isinstance(targets, str) else tuple(targets),
        quantized=config.model.quantization != "none",
        double_quantization=config.model.double_quantization,
        dtype=dtype,
        repeated_keys=fused and wants_repeated_keys(base.config, device, dtype),
        card=device.type == "cuda",
        one_by_one=fused and config.data.packing and not one_kernel_for_all(device, dtype, head_size(base.config)),
    )


def generous_bound(model_config: Any, tokens: int) -> int:
    """More bytes than a step can take at level 0, by arithmetic alone.

    Everything in fp32: weights of a gated decoder, twelve hidden-sized and four intermediate-sized
    activations a token and layer, and the logits of one chunk.
    """
    hidden, layers = int(model_config.hidden_size), int(model_config.num_hidden_layers)
    wide: int = getattr(model_config, "intermediate_size", None) or 4 * hidden
    weights = layers * (4 * hidden * hidden + 3 * hidden * wide) + 2 * model_config.vocab_size * hidden
    activations = tokens * layers * (12 * hidden + 4 * wide)
    return int(4 * (weights + activations) + 2**29)
