"""Which examples make up which step: a pure function of the seed and the step number.

So the position in the data is the step count, and a resumed run needs nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch

GROUP = 50  # steps whose examples are sorted by length together


class BatchPlan:
    """Length-grouped batches: examples of similar length share a step, steps come in random order.

    ``micro_batch`` may be lowered while a run goes on: the examples of a step stay the same.

    Args:
        lengths: tokens of each training example.
        micro_batch: examples in one forward pass.
        grad_accum: forward passes in one step. Which examples make up a step depends only on
            ``micro_batch * grad_accum``.
        seed: of the order; every epoch has another.
    """

    def __init__(self, lengths: Sequence[int], *, micro_batch: int, grad_accum: int, seed: int) -> None:
        self.lengths, self.micro_batch, self.step_size, self.seed = lengths, micro_batch, micro_batch * grad_accum, seed
        self.steps_per_epoch = math.ceil(len(lengths) / self.step_size)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of one step: lists of example indices, the last may be short."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices = self._epoch(epoch)[position]
        return [indices[i : i + self.micro_batch] for i in range(0, len(indices), self.micro_batch)]

    def draws(self, step: int, place: int) -> int:
        """The seed of all that is drawn in a forward pass, as dropout's masks, whichever process makes it.

        Args:
            step: counted from 0.
            place: of the micro-batch in it.
        """
        text = f"{self.seed} {step} {place}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps = []
        for start in range(0, len(shuffled), GROUP * self.step_size):
            group = sorted(shuffled[start : start + GROUP * self.step_size], key=lambda i: -self.lengths[i])
            steps += [group[i : i + self.step_size] for i in range(0, len(group), self.step_size)]
        order = torch.randperm(len(steps), generator=generator).tolist()
        return [steps[i] for i in order]
