"""Timing in turns, A B A B, so that a machine whose speed drifts drifts for both.

Dimensions of the FLOP count: T tokens of a step, L sequence length.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaroma.bench.contestants import Step
from qaroma.method.dequantise import layer_shape
from qaroma.method.linear import has_matrix
from qaroma.plan.counter import LiveStorages


@dataclass(frozen=True)
class Spread:
    """Median of several measurements, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def seconds_per_step(
    steps: dict[str, Step], *, count: int, rounds: int, device: torch.device, warm: int = 2
) -> dict[str, list[float]]:
    """Mean seconds of a step in each round; in a round every contestant has its turn of ``count`` steps.

    Args:
        steps: name -> step.
        count: steps of one turn.
        rounds: turns of each.
        device: synchronised around every turn.
        warm: steps of each that run first, uncounted.
    """
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warm):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            synchronise(device)
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronise(device)
            measured[name].append((time.perf_counter() - start) / count)
    return measured


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Step, device: torch.device, resident: Sequence[torch.Tensor]) -> int:
    """Most bytes of tensors alive during one step.

    On a GPU the allocator's own figure. On a CPU every storage is followed, from what is resident on.

    Args:
        step: run once.
        device: where it runs.
        resident: tensors that are there before: the model's, the optimiser's.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device))
    with LiveStorages() as counter:
        counter.adopt(resident, "resident")
        counter.phase("step", "step")
        step()
    return int(counter.device.peak.bytes)


def busy_seconds(step: Step, device: torch.device) -> float:
    """How long a card computes and copies during one step, without the pauses in which it waits for the host.

    A fast card waits for the host's next kernel in a short step; a slower one, or a longer step, does not. On a CPU it
    is the step's time.

    Args:
        step: run once.
        device: where it runs.
    """
    if device.type != "cuda":
        return seconds_per_step({"": step}, count=1, rounds=1, device=device, warm=0)[""][0]
    synchronise(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        synchronise(device)
    busy, until = 0.0, 0.0  # microseconds; what overlaps counts once
    events = (e for e in profiler.events() if e.device_type.name == "CUDA" and not e.is_user_annotation)
    for span in sorted((event.time_range for event in events), key=lambda span: span.start):
        busy += max(0.0, span.end - max(until, span.start))
        until = max(until, span.end)
    return busy / 1e6


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product in ``dtype``: the bound that a step is held against."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_flops(model: Any, *, tokens: int, length: int, checkpointed: bool) -> float:
    """FLOPs that a step cannot do without: no weight gradients, adapters left out.

    Linear layers: forward, gradient of the input, and once more forward where recomputed. Head: forward
    and gradient. Causal attention: two products forward, four and a half times that in all when recomputed.
    """
    head = model.get_output_embeddings()
    linear = 0
    for module in model.modules():
        if module is not head and has_matrix(module):
            linear += math.prod(layer_shape(module) or ())
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 2 * 2 * length * width * config.num_hidden_layers / 2
    passes = 3 if checkpointed else 2
    products = 2 * linear * passes + 4 * head.in_features * head.out_features
    return float(tokens * (products + attention * (passes + 1.5)))
