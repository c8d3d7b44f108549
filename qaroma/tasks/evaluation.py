"""The loss over batches, in evaluation mode and without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qaroma.errors import QaromaError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Loss:
    """A summed cross-entropy, in nats, and the number of tokens it is the sum of."""

    sum: float
    count: int

    @property
    def mean(self) -> float:
        """Loss per trained token."""
        return self.sum / self.count

    @property
    def perplexity(self) -> float:
        """exp(mean), infinite where that overflows."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in before.

    Args:
        model: the model; modules of one model may be in different modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate_loss(
    loss_fn: Callable[[Batch], tuple[Tensor, int | Tensor]], batches: Iterable[Batch], model: nn.Module
) -> Loss:
    """The loss over batches, each token counted once whatever batch it is in.

    Args:
        loss_fn: gives the summed loss of a batch (a scalar) and its number of trained tokens.
        batches: what ``loss_fn`` takes.
        model: put into evaluation mode meanwhile.

    Returns:
        Sum and count.

    Raises:
        QaromaError: The batches hold no trained token.
    """
    # The sums stay where they are made until the end: one device synchronisation in all.
    sums: list[Tensor] = []
    counts: list[int | Tensor] = []
    with evaluating(model):
        for batch in batches:
            total, count = loss_fn(batch)
            sums.append(total.detach())
            counts.append(count)
    trained = sum(int(count) for count in counts)
    if trained == 0:
        raise QaromaError("the evaluation data has no trained token; expected rows with answers.")
    return Loss(float(torch.stack(sums).double().sum().item()), trained)
