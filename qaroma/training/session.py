"""Everything a run needs, built and plain to see: the argument of the loop's functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import nn

from qaroma.config import Config
from qaroma.data.encode import Example
from qaroma.engine.placement import head_quantization
from qaroma.method.base import Method
from qaroma.runs import MetricsLog, RunDirectory
from qaroma.tasks.base import Batch, Task
from qaroma.training.batches import BatchPlan


@dataclass
class Session:
    """One run's parts.

    Attributes:
        config: resolved; no value of None that the run needs.
        run, log: where it is written.
        model: base with the adapter attached.
        base_name, fingerprint: which base that is.
        template: as JSON, for the adapter to remember.
        task, method: what is trained, and how.
        train, validation: encoded examples.
        plan: which examples make up which step.
        accelerator: device and backward pass.
        level: memory level that the model is in (:mod:`qaroma.engine.levels`).
    """

    config: Config
    run: RunDirectory
    log: MetricsLog
    model: nn.Module
    base_name: str
    fingerprint: str
    template: dict[str, Any]
    task: Task
    method: Method
    train: list[Example]
    validation: list[Example]
    plan: BatchPlan
    accelerator: Accelerator
    level: int = 0
    _validation_batches: list[Batch] = field(default_factory=list)

    def validation_batches(self) -> Iterator[Batch]:
        """The validation rows, similar lengths together, in micro-batches; always the same."""
        if not self._validation_batches:
            ordered = sorted(self.validation, key=lambda e: len(e.input_ids))
            size = self.config.training.micro_batch
            chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
            self._validation_batches = [self.task.collate(chunk) for chunk in chunks]
        return iter(self._validation_batches)

    def describe(self, step: int) -> dict[str, Any]:
        """What ``growth.json`` says beside the components."""
        model = self.config.model
        return {
            "method": self.method.name,
            "step": step,
            "base": {
                "name": self.base_name,
                "revision": model.revision,
                "fingerprint": self.fingerprint,
                "quantization": model.quantization,
                "double_quantization": model.double_quantization,
                "head_quantization": head_quantization(self.model),
                "compute_dtype": model.compute_dtype,
            },
            "template": self.template,
            "settings": self.config.growth.model_dump(),
        }
