"""Removing redundant directions from an adapter before it is exported.

Components grow one after the other and may point the same way. The sum of a module's components is
re-factorised exactly (QR of both factors and an SVD of an R x R matrix; the m x n product is never
formed), and the smallest singular values are dropped as far as a stated error allows.

Dimensions: N in_features, M out_features, R rank before, K rank after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qaroma.method.factors import Factors, Update
from qaroma.method.spectrum import product_svd, truncated

_ROUNDING = 1e-7  # singular values below this share of the largest are fp32 rounding of the factors


@dataclass(frozen=True)
class Compression:
    """What compression did.

    Attributes:
        error: the relative error that was allowed, per module, in the Frobenius norm.
        before, after: sums of the ranks of all modules.
        largest_before, largest_after: the largest rank.
        reached: the largest relative error of a module.
    """

    error: float
    before: int
    after: int
    largest_before: int
    largest_after: int
    reached: float


def compress_factors(factors: Factors, error: float) -> tuple[Factors, float]:
    """The update of smallest rank within a relative error, ||B^T A - B'^T A'||_F <= error ||B^T A||_F.

    Equivalent to truncating ``torch.linalg.svd(B.T @ A)``; by Eckart and Young no update of that rank
    is nearer.

    Args:
        factors: a (R, N) and B (R, M).
        error: 0 drops nothing but directions of no size.

    Returns:
        The factors, A' (K, N) and B' (K, M), and the relative error reached.
    """
    if factors.rank == 0:
        return factors, 0.0
    svd = product_svd(*factors)
    squares = svd[1].square()
    total = squares.sum()
    if total == 0:
        return Factors.zero(factors.shape), 0.0
    # dropped[k] is the squared error of keeping the k largest.
    dropped = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    allowed = max(error, _ROUNDING) ** 2 * total
    rank = int((dropped > allowed).sum())
    return truncated(svd, rank), float((dropped[rank] / total).sqrt())


def compress(update: Update, error: float) -> tuple[dict[str, Factors], Compression]:
    """:func:`compress_factors` for every module.

    Args:
        update: the update.
        error: relative error allowed in each module, 0 or more and below 1.
    """
    compressed, errors = {}, [0.0]
    for name, factors in update.items():
        compressed[name], reached = compress_factors(factors, error)
        errors.append(reached)
    before, after = ([f.rank for f in each.values()] for each in (update, compressed))
    return compressed, Compression(error, sum(before), sum(after), max(before), max(after), max(errors))
