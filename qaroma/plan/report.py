"""What ``qaroma plan`` answers, as figures and as a page to read."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from qaroma.config.levels import LEVELS
from qaroma.config.words import duration, file_size, memory_size
from qaroma.errors import QaromaError
from qaroma.model.failures import explained
from qaroma.model.precision import dtype_name, overflows
from qaroma.plan.card import RESERVE, Card
from qaroma.plan.gpus import PCIE3_X8, SharedStep, shared_table
from qaroma.plan.search import LONGEST, Estimate, Planner
from qaroma.plan.shapes import HUB_IDS, model_config
from qaroma.plan.trace import StepSettings
from qaroma.plan.weightless_model import adapter_parameters
from qaroma.plan.work import BANDWIDTH, COPIES, LAUNCH, PRODUCTS, step_seconds

CHECKPOINTS = 3  # on disk at a time: two are kept while a third is written
EPOCHS = 3  # of a run, as settings decide where the data is not small
_PHASES = {
    "setup": "set-up",
    "forward": "forward pass",
    "loss": "loss",
    "backward": "backward pass",
    "update": "update",
}


@dataclass(frozen=True)
class Plan:
    """The answer for one model and one step.

    Attributes:
        model: as it was named.
        parameters, trained: of the base, and of one component in all its layers.
        positions: longest input that the model was made for.
        attention: transformers' implementation that is counted.
        vram: bytes of the card; None where none was named.
        levels: the same step at every level that was looked at.
        chosen: the level to use; None where none fits.
        longest: the step with the longest context that fits; None without a card, or where nothing does.
        disk: bytes of the base's download and of a run.
        shared: the step on as many GPUs as were asked for.
        cards: whose times are told.
        rows: examples of the run whose time is told.
        overflows: whether its family is known to overflow in fp16.
    """

    model: str
    parameters: int
    trained: int
    positions: int | None
    attention: str
    vram: int | None
    levels: tuple[Estimate, ...]
    chosen: Estimate | None
    longest: Estimate | None
    disk: int
    shared: SharedStep
    cards: tuple[Card, ...] = ()
    rows: int = 1000
    overflows: bool = False

    @property
    def shown(self) -> Estimate:
        """The step whose bytes are laid out: the chosen one, or the smallest there is."""
        return self.chosen or self.levels[-1]

    def fits(self, found: Estimate, card: Card) -> bool:
        """Whether a step fits a card, or the memory that was named in its place."""
        return found.peak <= (self.vram or card.gib * 2**30) - RESERVE

    def fastest(self) -> list[tuple[Card, Estimate]]:
        """Each card that holds some level, with the step that is fastest there."""
        fitting = {card: [found for found in self.levels if self.fits(found, card)] for card in self.cards}
        return [
            (card, min(found, key=lambda one: step_seconds(one.work, card))) for card, found in fitting.items() if found
        ]

    def run_seconds(self, found: Estimate, card: Card) -> float:
        """Of :data:`EPOCHS` passes over the run's rows, by arithmetic."""
        return step_seconds(found.work, card) / found.settings.micro_batch * self.rows * EPOCHS

    def to_json(self) -> dict[str, Any]:
        """Every figure, in bytes and tokens."""
        shown, settings = self.shown, self.shown.settings
        return {
            "model": self.model,
            "seq_len": settings.seq_len,
            "micro_batch": settings.micro_batch,
            "sequences": settings.micro_batch * settings.sequences,
            "compute_dtype": dtype_name(settings.dtype),
            "memory_level": settings.level,
            "peak_bytes": shown.peak,
            "resident_bytes": shown.resident,
            "host_bytes": shown.host,
            "disk_bytes": self.disk,
            "vram_bytes": self.vram,
            "fits": None if self.vram is None else self.chosen is not None,
            "max_context": None if self.longest is None else self.longest.settings.seq_len,
            "max_context_level": None if self.longest is None else self.longest.settings.level,
            "max_context_host_bytes": None if self.longest is None else self.longest.host,
            "breakdown": shown.breakdown,
            "gpus": self.shared.to_json(shown, self.fastest()) if self.shared.gpus > 1 else None,
            "levels": [
                {"memory_level": e.settings.level, "peak_bytes": e.peak, "resident_bytes": e.resident,
                 "host_bytes": e.host,
                 "seconds_by_arithmetic": {card.title: step_seconds(e.work, card) for card in self.cards}}
                for e in self.levels
            ],
        }  # fmt: skip


def make_plan(
    model: str, settings: StepSettings, *, memory: str = "auto", vram: int | None = None,
    cards: tuple[Card, ...] = (), rows: int = 1000, gpus: int = 1, grad_accum: int = 1,
    trust_remote_code: bool = False, tell: Callable[[str], None] = lambda _: None,
) -> Plan:  # fmt: skip
    """Find out what a step takes and what a card holds.

    Args:
        model: see :func:`qaroma.plan.shapes.model_config`.
        settings: of the step; its level does not matter.
        memory: ``auto`` or a level.
        vram: bytes of the card, if one is meant.
        cards: whose times are to be told.
        rows: examples of the run whose time is.
        gpus: that share a step, each of them such a card.
        grad_accum: micro-batches that they share.
        trust_remote_code: run Python code that comes with the model.
        tell: called with what is being looked at.

    Raises:
        QaromaError: no such model, one that cannot be planned, or a card smaller than what is kept free.
    """
    if vram is not None and vram <= RESERVE:
        raise QaromaError(
            f"got a card of {memory_size(vram)}; expected more than the {memory_size(RESERVE)} that are kept free"
        )
    config = model_config(model, trust_remote_code=trust_remote_code)
    planner = Planner(config)
    with explained(model):
        base = planner.base
    limit = None if vram is None else vram - RESERVE
    asked = range(len(LEVELS)) if memory == "auto" else (int(memory),)
    levels = []
    for level in asked:
        tell(f"tracing a step of {settings.seq_len:,} tokens at level {level}")
        levels.append(planner.estimate(replace(settings, level=level)))
    fitting = [index for index, found in enumerate(levels) if limit is None or found.peak <= limit]
    chosen = None
    if fitting and (limit is not None or len(levels) == 1):
        chosen = levels[fitting[0]]
    longest = None
    if limit is not None:
        tell(f"looking for the longest context at level {asked[-1]}")
        longest = planner.longest_context(replace(settings, level=asked[-1]), limit)
    parameters = sum(p.numel() for p in base.parameters())
    width = adapter_parameters(base, settings.targets)
    trained, frozen = width * settings.inner_rank, width * settings.frozen_rank
    disk = 2 * parameters + CHECKPOINTS * (12 * trained + 2 * frozen)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Plan(
        model,
        parameters,
        trained,
        positions,
        base.config._attn_implementation,
        vram,
        tuple(levels),
        chosen,
        longest,
        disk,
        SharedStep(gpus, grad_accum, 4 * trained),
        cards,
        rows,
        overflows(config),
    )


def print_plan(plan: Plan, console: Console) -> None:
    """Write a plan for people."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    settings = plan.shown.settings
    pairs = " pairs of 2" if settings.sequences == 2 else ""
    say(
        f"{plan.model}: {plan.parameters:,} parameters; {settings.micro_batch}{pairs} x {settings.seq_len:,} tokens, "
        f"{settings.frozen_rank} frozen ranks and {settings.inner_rank} in training in every layer; "
        f"{dtype_name(settings.dtype)}\n"
    )
    console.print(_levels_table(plan))
    say("")
    for found in plan.levels:
        say(f"Level {found.settings.level}: {LEVELS[found.settings.level].summary}.")
    say(f"\nWhere the bytes are at the peak of level {settings.level}, which is in the {_PHASES[plan.shown.phase]}:")
    console.print(_breakdown_table(plan))
    for line in ("", *_lines(plan)):
        say(line)
    if plan.cards:
        say(
            f"\nTime of a step, and of a run of {EPOCHS} passes over {plan.rows:,} such examples. Arithmetic, not "
            "measured: "
            f"{100 * PRODUCTS:g} % of a card's peak in products, {100 * BANDWIDTH:g} % of its memory's rate, "
            f"{LAUNCH * 1e6:g} us a kernel, copies beside."
        )
        console.print(_time_table(plan))
    if plan.shared.gpus > 1:
        _print_shared(plan, console)
    if plan.chosen is not None:
        memory, length = plan.chosen.settings.level, settings.seq_len
        say(
            f"\nNext: qaroma finetune --model {shlex.quote(HUB_IDS.get(plan.model.lower(), plan.model))} --data FILE "
            f"--max-length {length} --memory {memory}{_gpu_options(plan.shared)}"
        )


def _print_shared(plan: Plan, console: Console) -> None:
    """What several GPUs change."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    shared, host = plan.shared, plan.shown.host
    together = f" Host memory of all on one machine: {memory_size(shared.gpus * host)}." if host else ""
    say(
        f"\n{shared.gpus} GPUs, each of which takes {shared.grad_accum // shared.gpus} of a step's {shared.grad_accum} "
        f"micro-batches and holds base, adapter and optimiser whole: {memory_size(shared.peak(plan.shown))} on each, "
        f"NCCL's own buffers not counted.{together}"
    )
    say(
        f"Once a step they sum {file_size(shared.gradients)} of gradients in fp32, a copy that is there when the "
        f"activations are gone: in a ring each sends {file_size(shared.traffic)} and is sent as much, "
        f"{1e3 * shared.reducing(PCIE3_X8):.3g} ms on PCIe 3 x8 ({PCIE3_X8:g} GB/s) without NVLink."
    )
    fastest = plan.fastest()
    if fastest:
        say(
            f"A step of {shared.grad_accum} micro-batches by the same arithmetic, and the all-reduce's part of it, "
            f"there and on the card's own bus at {100 * COPIES:g} % of its rate:"
        )
        console.print(shared_table(shared, fastest))


def _gpu_options(shared: SharedStep) -> str:
    return f" --gpus {shared.gpus} --grad-accum {shared.grad_accum}" if shared.gpus > 1 else ""


def _levels_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("level", "peak", "between steps", "host memory"):
        table.add_column(name, justify="right")
    if plan.vram is not None:
        table.add_column(f"on {memory_size(plan.vram)}")
    for found in plan.levels:
        row = [str(found.settings.level), *(memory_size(count) for count in (found.peak, found.resident, found.host))]
        if plan.vram is not None:
            row.append("fits" if found.peak <= plan.vram - RESERVE else "too large")
        table.add_row(*row)
    return table


def _breakdown_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=20)
    table.add_column(justify="right")
    for name, size in sorted(plan.shown.breakdown.items(), key=lambda item: -item[1]):
        if size >= 2**20:
            table.add_row(name.replace("_", " "), memory_size(size))
    table.add_row("together", memory_size(plan.shown.peak))
    return table


def _lines(plan: Plan) -> list[str]:
    """What follows from the figures, a sentence each."""
    lines = []
    settings = plan.shown.settings
    if plan.vram is not None:
        card = f"{memory_size(plan.vram)} of memory, {memory_size(RESERVE)} of it kept free"
        if plan.chosen is not None:
            lines.append(f"Use --memory {settings.level}: the fastest level that fits {card}.")
        else:
            lines.append(f"Too large for {card}: level {settings.level} takes {memory_size(plan.shown.peak)}.")
        lines += _context_lines(plan)
    else:
        lines.append("Say which card, to see the level to use, the longest context and the time: --card rtx3060")
    host = plan.shown.host
    if host:
        lines.append(f"Host memory: {memory_size(host)}{_beside_this_machine(host)}.")
    if settings.dtype == torch.float16 and plan.overflows:
        lines.append("It is known to overflow in fp16: runs on a GPU without bf16 take fp32. Type: --dtype fp32")
    if settings.repeated_keys and plan.attention == "sdpa":
        lines.append(
            "Attention: SDPA's memory-efficient kernel, grouped key heads repeated: none that is fused takes them in "
            "fp32, nor in fp16 before RTX 30."
        )
    if plan.attention == "eager":
        lines.append("transformers has no fused attention for it: memory grows with the square of the context.")
    if plan.vram is not None and not plan.cards:
        lines.append("Say which card, to see how long it takes: --card rtx3060")
    lines.append(f"Disk: {memory_size(plan.disk)} for the download in bf16 and the checkpoints of a run.")
    return lines


def _time_table(plan: Plan) -> Table:
    """Seconds of a step at each level that fits a card; the last column is the run at the fastest."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # in 80 columns, as pipes have
    table.add_column("card", no_wrap=True)
    table.add_column("memory", justify="right")
    for found in plan.levels:
        table.add_column(f"level {found.settings.level}", justify="right")
    table.add_column("the run", justify="right")
    for card in plan.cards:
        fit = [plan.fits(found, card) for found in plan.levels]
        seconds = [step_seconds(found.work, card) for found in plan.levels]
        cells = [f"{time:.3g} s" if holds else "-" for time, holds in zip(seconds, fit, strict=True)]
        runs = [plan.run_seconds(found, card) for found, holds in zip(plan.levels, fit, strict=True) if holds]
        table.add_row(card.title, f"{card.gib} GiB", *cells, duration(min(runs)) if runs else "-")
    return table


def _context_lines(plan: Plan) -> list[str]:
    longest = plan.longest
    if longest is None:
        return ["No context fits. Name a smaller --model, or a larger card."]
    tokens = longest.settings.seq_len
    least = "at least " if tokens >= LONGEST else ""
    line = f"Longest context that fits: {least}{tokens:,} tokens, at level {longest.settings.level}"
    lines = [f"{line}, with {memory_size(longest.host)} of host memory{_beside_this_machine(longest.host)}."]
    if plan.positions is not None and tokens > plan.positions:
        lines.append(f"The model was made for {plan.positions:,} tokens.")
    return lines


def _beside_this_machine(host: int) -> str:
    there = psutil.virtual_memory().total
    return f", more than this machine's {memory_size(there)}" if host > there else ""
