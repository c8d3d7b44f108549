"""What the training loop asks of a task.

Dimensions: B examples in a micro-batch, L sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qaroma.data.encode import Example

IGNORED = -100  # label of a token that the loss does not count


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: (B, L) int64, padded on the right.
        labels: (B, L) int64, aligned with ``input_ids``; ``IGNORED`` where nothing is trained,
            always so at the first token of a sequence.
        position_ids: (B, L) int64, from 0 within each sequence (padding counts on).
        lengths: for each row the lengths of the sequences that lie in it one after the other.
        trained: (T,) int64, where the counted tokens stand in the flattened labels; made with the
            batch, so that no loss has to ask the device.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[tuple[int, ...], ...]
    trained: Tensor

    @property
    def counted(self) -> int:
        """Number of targets that the loss counts."""
        return self.trained.shape[0]

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            trained=self.trained.to(device, non_blocking=True),
        )

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(sum(row) for row in self.lengths)


class Task(Protocol):
    """How examples become batches, batches a loss, and a validation pass a set of figures."""

    name: str

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples of one micro-batch, as tensors on the CPU."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss over the counted targets, as an fp32 scalar, and their number."""
        ...

    def metrics(self, loss_sum: float, count: int) -> Mapping[str, Any]:
        """Figures of a validation pass, ``loss`` among them; the smaller the loss the better."""
        ...
