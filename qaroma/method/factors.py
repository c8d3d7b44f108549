"""What an adapter adds to one weight, as two factors: the form that everything outside a layer works with.

Dimensions: N in_features, M out_features, R rank. The weight becomes W + B^T A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One module's update B^T A, all its components one after the other; the scale stands in B.

    Attributes:
        A: (R, N).
        B: (R, M).
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of the weight."""
        return self.B.shape[1], self.A.shape[1]

    def on_host(self) -> Factors:
        """The same in fp32 on the CPU."""
        return Factors(*(factor.detach().float().cpu().contiguous() for factor in self))

    @classmethod
    def zero(cls, shape: tuple[int, int], rank: int = 0) -> Factors:
        """An update of a weight (M, N) that changes nothing."""
        return cls(torch.zeros(rank, shape[1]), torch.zeros(rank, shape[0]))


# Full module name -> what is added to its weight, every target module in the model's order.
Update = Mapping[str, Factors]
