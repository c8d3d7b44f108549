"""Learning rates from dimensions: how large noise makes an update beside its weight, and rates that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import mean, median

# Of a weight's norm, times the square root of the rank: what noise alone makes of an update at a rate that works.
# Fits the best rates known for SmolLM2-135M, MiniLM-L6 and LLaMA-3-8B within a third.
NOISE_SIZE = 0.025
# Of the measured rate, all found on a byte-level model: its first factor; the cosine at which the best rates stand;
# what counts as a large difference from it; the bound. The most that a step changes the factor's logarithm: first, with
# CLIMB over all measured steps but within bounds, and last. A faster climb ends above the best rate, for what a run
# learns first stands any; a slower one leaves a long run at rates that are too small. Once it was enough, the factor
# keeps to this share of the largest one: on 1,024 random pairs the cosine says too long at every rate, the one that
# learns them included.
SMALL_START, AIM, WIDTH, LARGEST_FACTOR = 0.5, -0.025, 0.05, 64.0
CLIMB, LEAST_CLIMB, FASTEST, SLOWEST, LEAST_OF_LARGEST = 10.0, 0.1, 0.4, 0.07, 0.5
RISEN = 1.2  # of the first losses: above it, the rate was too large
FIRST, LAST = 5, 3  # losses: the mean of the last is compared with the median of the first, for batches differ
_COSINE = 0.404  # mean square of a cosine that ends at a tenth


def noise_size(rate: float, *, steps: int, width: int, weight_std: float, scale: float) -> float:
    """Relative size that a rank-one component reaches under gradients of pure noise.

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
    back, too long. The cosine between the two moves the factor, one for all components: fast from a small start
    until the cosine first says that it is enough, then ever more slowly. One that has climbed above the given rate then
    keeps to half of its largest value at least. After a quarter of the run it stays at its mean over the second half of
    that time. A loss above the first one moves it down, whatever the cosine says, and as far as it takes. A run so does
    not depend on the rate it was given.

    Args:
        steps: over which it is measured; 0 leaves the rate as it was given.
    """

    steps: int
    factor: float = 1.0
    cosine: float | None = None  # of the step before
    enough: int | None = None  # step at which the cosine first said so
    largest: float = 0.0  # factor since then
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    log_sum: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        if self.steps:
            self.factor = SMALL_START

    def measuring(self, step: int) -> bool:
        """Whether the factor still moves before the update of this step (counted from 0)."""
        return step < self.steps

    def observe(self, step: int, cosine: float, loss: float) -> None:
        """Move the factor before the update of a step.

        Args:
            step: counted from 0; the first one has no update before it.
            cosine: of the angle between the descent direction of this step's gradient and the last update.
            loss: mean training loss of the step.
        """
        risen = self._risen(loss)
        recent = cosine if self.cosine is None else (cosine + self.cosine) / 2
        self.cosine = cosine
        fastest = gain = min(FASTEST, max(LEAST_CLIMB, CLIMB / self.steps))
        if self.enough is not None:
            gain = max(SLOWEST, fastest / (1 + (step - self.enough) / 3))
        elif recent < AIM:
            self.enough = step
        change = -fastest if risen else gain * math.tanh((recent - AIM) / WIDTH)
        moved = self.factor * math.exp(change)
        if risen:
            self.largest = min(self.largest, moved)
        elif self.enough is not None:
            self.largest = max(self.largest, self.factor)
            if self.largest > 1.0:  # else the given rate was too large, by nobody knows how much
                moved = max(moved, LEAST_OF_LARGEST * self.largest)
        self.factor = min(max(moved, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        if step >= self.steps // 2:
            self.log_sum += math.log(self.factor)
            self.count += 1
        if step == self.steps - 1:
            self.factor = math.exp(self.log_sum / self.count)

    def _risen(self, loss: float) -> bool:
        """Whether the loss is above what it was at first."""
        if len(self.first_losses) < FIRST:
            self.first_losses.append(loss)
        self.last_losses = [*self.last_losses, loss][-LAST:]
        return mean(self.last_losses) > RISEN * median(self.first_losses)
