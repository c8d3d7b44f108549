"""Which adapter of a run validation chooses, and which validations count towards the run's patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qaroma.config.metrics import metric_facts

SETTLING = 0.5  # of the steps: so long the learning rate is high, and validation rises and falls with it
CLEARLY = 2.0  # standard errors


@dataclass
class Choice:
    """What the validations of a run have chosen so far.

    A loss chooses the adapter at which it is lowest. A share of labels or a correlation is known no better than its
    standard error: of adapters within one of the best figure the last is chosen, which was trained longest. (MiniLM on
    SST-2, ten adapters judged by 64 rows: the one with the best figure was two points worse than the last.)

    Attributes:
        best: figure of the chosen adapter; None before there is one.
        best_step: at which it stood.
        record: the best figure of any validation.
        without_gain: validations since then that count towards patience.
    """

    best: float | None = None
    best_step: int = 0
    record: float | None = None
    without_gain: int = 0

    def observe(self, metric: str, figures: Mapping[str, Any], *, step: int, done: float) -> bool:
        """Take a validation; returns whether the adapter of this moment is the chosen one now.

        Args:
            metric: the task's.
            figures: ``metric``, ``loss`` and ``loss_error``; ``examples`` too where the metric is one of labels.
            step: optimiser steps done.
            done: the same as a share of the budget.
        """
        facts, value = metric_facts(metric), float(figures[metric])
        if not math.isfinite(value):
            self.without_gain += 1
            return False
        gained = self.record is None or facts.better(value, self.record)
        if gained:
            self.record, self.without_gain = value, 0
        elif metric != "loss" or counts_as_lost(value, self._record, error=figures["loss_error"], done=done):
            self.without_gain += 1
        if facts.estimates is None:
            chosen = gained
        else:
            chosen = gained or abs(value - self._record) <= facts.error(self._record, figures["examples"])
        if chosen:
            self.best, self.best_step = value, step
        return chosen

    @property
    def _record(self) -> float:
        assert self.record is not None
        return self.record


def counts_as_lost(loss: float, best: float, *, error: float, done: float) -> bool:
    """Whether a validation that is not the best one counts towards patience.

    Later in a run each does. In its first half only one that is clearly worse: measured on a byte-level model, three
    that were worse by a fifth of a standard error ended a run whose loss fell by two per cent more (examples/paper).

    Args:
        loss, best: of this validation, and the lowest before it.
        error: standard error of the loss.
        done: share of the steps.
    """
    return done > SETTLING or loss > best + CLEARLY * error
