"""Learning rates from dimensions: how large noise makes an update beside its weight, and rates that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of a weight's norm, times the square root of the rank: what noise alone makes of an update at a rate that works.
# Fits the best rates known for SmolLM2-135M, MiniLM-L6 and LLaMA-3-8B within a third.
NOISE_SIZE = 0.025
# Of the measured rate: most of a step's change (its logarithm), a pull upwards, what cosine counts as much, the bound.
GAIN, BIAS, WIDTH, LARGEST_FACTOR = 0.07, 0.02, 0.05, 32.0
_COSINE = 0.404  # mean square of a cosine that ends at a tenth


def noise_size(rate: float, *, steps: int, width: int, weight_std: float, scale: float) -> float:
    """Relative size that a rank-one component reaches under gradients of pure noise (METHOD, "What the criteria measure").

    ``s d sqrt(1 / (3 n) + d^2) / sigma`` with ``d = sqrt(sum of rate_t^2)``: simulated for n = 128 to 4,096, it
    holds within 30 %.

    Args:
        rate: peak learning rate of a cosine that ends at a tenth.
        steps: over which it falls.
        width: n, the weight's input features.
        weight_std: sigma, the standard deviation of the weight's elements.
        scale: s, alpha / r.
    """
    walked = rate * math.sqrt(_COSINE * steps)
    return scale * walked * math.sqrt(1 / (3 * width) + walked * walked) / weight_std


def rate_for(*, steps: int, width: int, weight_std: float, scale: float, rank: int) -> float:
    """The learning rate at which noise makes an update of that rank :data:`NOISE_SIZE` of its weight.

    Args:
        steps, width, weight_std, scale: see :func:`noise_size`.
        rank: components that train in a module.

    Returns:
        Solves ``noise_size(rate) * sqrt(rank) = NOISE_SIZE``, a quadratic in the square of what is walked.
    """
    share = NOISE_SIZE * weight_std / (scale * math.sqrt(rank))
    narrow = 1 / (3 * width)
    walked_sq = (math.sqrt(narrow * narrow + 4 * share * share) - narrow) / 2
    return math.sqrt(walked_sq / (_COSINE * steps))


@dataclass
class MeasuredRate:
    """A factor on the learning rate, found while the run begins: does the next gradient want more of the last update?

    Where the gradient of step t points along the update of step t - 1, that update was too short; where it points
    back, too long. The cosine between them moves the factor, for all components together; after the first steps
    it stays. A rate that starts wrong is so set right, and a run does not depend on what it was given.

    Args:
        steps: over which it is measured.
        factor: on the learning rate.
    """

    steps: int
    factor: float = 1.0

    def measuring(self, step: int) -> bool:
        """Whether the update of this step (counted from 0) is looked at."""
        return step < self.steps

    def observe(self, cosine: float) -> None:
        """Move the factor.

        Args:
            cosine: of the angle between the descent direction of a step's gradient and the update before it.
        """
        self.factor *= math.exp(GAIN * math.tanh((cosine + BIAS) / WIDTH))
        self.factor = min(max(self.factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
