"""Which adapter validation chooses, and which validations count towards patience."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qaroma.config.metrics import METRICS
from qaroma.training.choice import Choice


def observed(choice: Choice, metric: str, values: list[float], **figures: Any) -> list[bool]:
    return [
        choice.observe(metric, {metric: value, **figures}, step=step, done=step / len(values))
        for step, value in enumerate(values, start=1)
    ]


def test_a_loss_chooses_the_lowest() -> None:
    choice = Choice()
    assert observed(choice, "loss", [1.0, 0.8, 0.81, 0.7, 0.9, 0.95], loss_error=0.5) == [1, 1, 0, 1, 0, 0]
    assert (choice.best, choice.best_step, choice.record, choice.without_gain) == (0.7, 4, 0.7, 2)


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_of_labels_the_last_within_a_standard_error_is_chosen(metric: str) -> None:
    """64 rows: 0.80 is known to 0.05, so that 0.77 after it is as good, and was trained longer; 0.70 is worse."""
    choice = Choice()
    chosen = observed(choice, metric, [0.6, 0.8, 0.78, 0.77, 0.70], loss=1.0, loss_error=0.1, examples=64)
    assert chosen == [True, True, True, True, False]
    assert (choice.best, choice.best_step, choice.record, choice.without_gain) == (0.77, 4, 0.8, 3)
    # Not from one to the next: each stands beside the best of all.
    assert observed(choice, metric, [0.755, 0.74], loss=1.0, loss_error=0.1, examples=64) == [True, False]


def test_equal_losses_leave_the_first_one_and_equal_shares_the_last() -> None:
    assert observed(Choice(), "loss", [0.5, 0.5], loss_error=0.1) == [True, False]
    assert observed(Choice(), "accuracy", [1.0, 1.0], loss=1.0, loss_error=0.1, examples=64) == [True, True]


def test_with_many_rows_the_best_is_chosen() -> None:
    choice = Choice()
    assert observed(choice, "accuracy", [0.8, 0.79], loss=1.0, loss_error=0.1, examples=100_000) == [True, False]


def test_standard_errors_of_shares_and_correlations() -> None:
    assert METRICS["accuracy"].error(0.8, 100) == pytest.approx(0.04)
    assert METRICS["pearson"].error(0.8, 101) == pytest.approx(0.036)
    assert METRICS["loss"].error(0.8, 100) == METRICS["accuracy"].error(0.8, 1) == 0.0


def test_what_is_no_number_is_not_chosen_and_counts_as_lost() -> None:
    choice = Choice()
    assert observed(choice, "loss", [math.nan, 2.0, math.inf], loss_error=0.0) == [False, True, False]
    assert (choice.best, choice.without_gain) == (2.0, 1)


def test_in_the_first_half_only_clear_losses_count() -> None:
    choice = Choice()
    observed(choice, "loss", [1.0, 1.05, 1.3, 1.05, 1.05, 1.05, 1.05, 1.05], loss_error=0.1)
    assert choice.without_gain == 1 + 4  # step 3 by two errors, then those after half of the run
