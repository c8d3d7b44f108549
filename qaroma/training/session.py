"""Everything a run needs, built and plain to see: the argument of the loop's functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from qaroma.config.resolved import ResolvedConfig
from qaroma.engine.placement import head_quantization
from qaroma.method.base import Method
from qaroma.method.head import TrainedHead
from qaroma.model.base import uses_remote_code
from qaroma.model.builtin import portable_name
from qaroma.runs.adapter import read_adapter, write_adapter
from qaroma.runs.adapter_info import AdapterInfo, BaseInfo, TaskInfo
from qaroma.runs.directory import RunDirectory
from qaroma.runs.log import MetricsLog
from qaroma.tasks.base import Batch, Task
from qaroma.training.batches import BatchPlan
from qaroma.training.data_fingerprint import data_fingerprint
from qaroma.training.loss_scale import LossScale
from qaroma.training.ranks import Ranks
from qaroma.training.samples import Sampler


@dataclass
class Session:
    """One run's parts.

    Attributes:
        config: of the run.
        run, log: where it is written.
        model: base with the adapter attached.
        base_name, fingerprint: which base that is.
        remember: what the adapter must know of the task to be used again.
        task, method: what is trained, and how.
        head: what is trained in full beside the adapter; None for language models.
        train, validation: encoded examples.
        plan: which examples make up which step.
        accelerator: device and backward pass.
        sampler: answers chosen prompts while the run trains; None where there are none.
        level: memory level that the model is in (:data:`qaroma.config.levels.LEVELS`).
        notes: sentences on the arithmetic, and on what of the base no adapter takes.
        loss_scale: of a run in fp16; None for the others.
        ranks: the processes that train it, of which this is one.
    """

    config: ResolvedConfig
    run: RunDirectory
    log: MetricsLog
    model: nn.Module
    base_name: str
    fingerprint: str
    remember: TaskInfo
    task: Task
    method: Method
    head: TrainedHead | None
    train: list[Any]
    validation: list[Any]
    plan: BatchPlan
    accelerator: Accelerator
    sampler: Sampler | None = None
    level: int = 0
    notes: list[str] = field(default_factory=list)
    loss_scale: LossScale | None = None
    ranks: Ranks = field(default_factory=Ranks)
    _validation_batches: list[Batch] = field(default_factory=list)
    _validation_size: int = 0  # rows of these

    @cached_property
    def data_fingerprint(self) -> dict[str, Any]:
        """Of the encoded examples; see :func:`qaroma.training.data_fingerprint.data_fingerprint`."""
        return data_fingerprint(self.train, self.validation)

    def validation_batches(self) -> Sequence[Batch]:
        """The validation rows, similar lengths together, in micro-batches; the same as long as these are."""
        size = self.plan.micro_batch
        if self._validation_size != size:
            ordered = sorted(self.validation, key=lambda e: e.tokens)
            chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
            self._validation_batches, self._validation_size = [self.task.collate(chunk) for chunk in chunks], size
        return self._validation_batches

    def save_adapter(self, folder: Path, step: int, figures: Mapping[str, Any] | None = None) -> None:
        """Write the adapter, and the head where one is trained, as they stand.

        Args:
            folder: of the adapter.
            step: optimiser steps that it was trained for.
            figures: its validation; None where there is none of what is written.
        """
        finite = {name: value for name, value in (figures or {}).items() if math.isfinite(value)}
        write_adapter(
            folder,
            self.method.factors(),
            replace(self.info(step), validation=finite),
            base=portable_name(self.base_name),
            head=self.head.tensors() if self.head else None,
        )

    def take_best(self) -> None:
        """Put the best adapter, which :meth:`save_adapter` wrote to ``run.adapter``, in the place of the last.

        Only once nothing trains any more.
        """
        best = read_adapter(self.run.adapter)
        self.method.load_factors(best.update, best.info.components)
        if self.head:
            self.head.load(best.head)

    def info(self, step: int) -> AdapterInfo:
        """What the adapter of this moment is to remember."""
        model, growth = self.config.model, self.config.growth
        return AdapterInfo(
            components=self.method.components(),
            inner_rank=self.config.component_rank,
            alpha=growth.alpha,
            method=self.method.name,
            step=step,
            base=BaseInfo(
                name=self.base_name,
                revision=model.revision,
                fingerprint=self.fingerprint,
                quantization=model.quantization,
                double_quantization=model.double_quantization,
                compute_dtype=model.compute_dtype,
                head_quantization=head_quantization(self.model),
                attention=model.attention,
                needs_remote_code=uses_remote_code(self.model),
            ),
            task=replace(self.remember, head=tuple(self.head.names)) if self.head else self.remember,
            settings=growth.model_dump(),
        )
