"""What a trial needs of a bed: a fresh model, the loss of a step, and two ways to look at what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.config.decisions import DataFacts
from qaroma.method.factors import Update


@dataclass
class Bench:
    """A bed set up for one trial.

    Attributes:
        model: fresh, without an adapter.
        facts: what the presets are told of the data.
        loss: mean loss of the batch of a step (counted from 0), a scalar with a graph.
        validate: ``loss`` of rows that neither train nor score, its standard error ``loss_error``, and what else the
            task says of them: what a method may decide by.
        score: the bed's metric on rows that nothing is decided by.
        head: modules to train in full.
        metric: of the validation rows, by which the adapter is chosen.
        learnt: more figures of the finished adapter, from its factors.
    """

    model: nn.Module
    facts: DataFacts
    loss: Callable[[int], Tensor]
    validate: Callable[[], Mapping[str, Any]]
    score: Callable[[], float]
    head: Sequence[str] = ()
    metric: str = "loss"
    learnt: Callable[[Update], dict[str, Any]] = field(default=lambda factors: {})


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's batch: a function of both, so that all arms of a seed see the same rows."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
