"""What the training loop asks of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

_Self = TypeVar("_Self", bound="Batch")


class Batch(Protocol):
    """One micro-batch, as tensors on one device."""

    @property
    def counted(self) -> int:
        """Number of targets that the loss counts."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        ...

    def to(self: _Self, device: torch.device) -> _Self: ...


class Task(Protocol):
    """How examples become batches, batches a loss, and a validation pass a set of figures.

    Attributes:
        metric: the figure by which the best adapter is chosen (:mod:`qaroma.config.metrics`).
        told: names of what :meth:`step` tells beside the loss, which gives one for each.
    """

    name: str
    metric: str
    told: tuple[str, ...]

    def collate(self, examples: Sequence[Any]) -> Any:
        """Examples of one micro-batch, as a :class:`Batch` on the CPU."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """The summed loss over the counted targets, as an fp32 scalar, and their number."""
        ...

    def step(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The summed loss, and by name the sums of what else the log says of a step, without gradient."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Any], device: torch.device) -> Mapping[str, Any]:
        """Figures over all batches, in eval mode and without gradient; ``loss`` is among them."""
        ...
