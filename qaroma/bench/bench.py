"""``qaroma bench``: from a model's name to the figures."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qaroma.bench.contestants import Step, examples, peft_step, qaroma_step, random_base, twin
from qaroma.bench.measure import Spread, matrix_rate, peak_bytes, seconds_per_step, step_flops
from qaroma.config.levels import LEVELS
from qaroma.errors import QaromaError
from qaroma.model.base import load_base, resolve_device
from qaroma.model.precision import resolve_dtype
from qaroma.plan.shapes import SHAPES, model_config
from qaroma.plan.weightless_model import tensors_of


@dataclass(frozen=True)
class BenchSize:
    """What is run: tokens, turns and the memory level."""

    length: int = 2048
    micro_batch: int = 1
    steps: int = 3
    rounds: int = 5
    level: int = 1
    frozen: int = 0


def bench(model: str, size: BenchSize, *, against: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Time qaroma's training step, alone or in turns with PEFT's QLoRA (r 8).

    Args:
        model: a built-in shape with random weights, or a folder, hub id or GGUF file.
        size: of the step and of the measurement.
        against: ``peft``, or None.
        device: as in a run.

    Returns:
        Figures: ``tokens_per_second`` and ``peak_bytes`` of each, their ratios, and the share of the
        device's own matrix rate.

    Raises:
        QaromaError: an unknown model, or peft asked for and not installed, or beside a streamed base.
    """
    if against is not None and LEVELS[size.level].streamed:
        raise QaromaError("PEFT cannot stream the base, whose weights both share here. Type: --memory 3")
    target = resolve_device(device)
    dtype = resolve_dtype("auto", target)
    base = _base(model, target, dtype)
    rows = examples(base.config.get_text_config().vocab_size, rows=size.micro_batch, length=size.length)
    steps: dict[str, Step] = {}
    resident: dict[str, list[Tensor]] = {}
    if against is not None:
        if against != "peft":
            raise QaromaError(f"got --against {against}; expected peft")
        other = twin(base)
        steps["peft"] = peft_step(other, rows, checkpointing=LEVELS[size.level].checkpointing)
        resident["peft"] = list(tensors_of(other))
    flops = step_flops(
        base, tokens=size.length * size.micro_batch, length=size.length, checkpointed=LEVELS[size.level].checkpointing
    )
    step, method = qaroma_step(base, rows, level=size.level, frozen=size.frozen)
    steps = {"qaroma": step, **steps}
    resident["qaroma"] = [*tensors_of(base), *method.trainer.optimiser.buffers().values()]
    seconds = seconds_per_step(steps, count=size.steps, rounds=size.rounds, device=target)
    gc.collect()
    tokens = size.length * size.micro_batch
    figures: dict[str, Any] = {"model": model, "device": str(target), **asdict(size)}
    for name, step in steps.items():
        figures[name] = {
            "seconds_per_step": asdict(Spread.of(seconds[name])),
            "tokens_per_second": asdict(Spread.of([tokens / s for s in seconds[name]])),
            "peak_bytes": peak_bytes(step, target, resident[name]),
        }
    rate = matrix_rate(target, dtype)
    figures["matrix_flops_per_second"] = rate
    figures["share_of_matrix_rate"] = flops / Spread.of(seconds["qaroma"]).median / rate
    if against is not None:
        ratios = [b / a for a, b in zip(seconds["qaroma"], seconds["peft"], strict=True)]
        figures["speed_ratio"] = asdict(Spread.of(ratios))
        figures["memory_ratio"] = figures["qaroma"]["peak_bytes"] / figures["peft"]["peak_bytes"]
    return figures


def _base(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    if model.lower() in SHAPES:
        return random_base(model_config(model), dtype=dtype, device=device)
    return load_base(model, compute_dtype=dtype, device=device)
