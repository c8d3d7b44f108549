"""Which validations without a better score count towards the end of a run."""

from __future__ import annotations

SETTLING = 0.5  # of the steps: so long the learning rate is high, and validation rises and falls with it
CLEARLY = 2.0  # standard errors


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
