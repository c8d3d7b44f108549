"""Leaving out of a trained update what is hardly there, so that each layer's rank is what it came to need.

Components that train together share the work: a layer ends with more directions than its update has. The directions of
all layers are ordered by size, in one list, and the smallest ones go.
"""

from __future__ import annotations

import torch

from qaroma.method.factors import Factors, Update
from qaroma.method.spectrum import product_svd, truncated


def trim(update: Update, error: float) -> dict[str, Factors]:
    """The update of least total rank within a relative error of the whole, over all layers together.

    Equivalent to dropping the smallest singular values of the block-diagonal matrix of all updates B^T A as long as
    the Frobenius norm of what is dropped is at most ``error`` times that of the whole; by Eckart and Young no update
    of so small a rank is nearer. A layer may be left with rank 0.

    Args:
        update: the factors of each layer, of any dtype.
        error: 0 drops nothing but directions of no size.

    Returns:
        fp32 factors of each layer on the update's device, in its order.
    """
    svds = {name: product_svd(A, B) for name, (A, B) in update.items()}
    squares = torch.cat([values.square() for _, values, _ in svds.values()]).sort().values
    dropped = squares.cumsum(0) <= error**2 * squares.sum()
    number = int(dropped.sum())
    smallest = float(squares[number]) if number < len(squares) else float("inf")
    return {name: truncated(svd, int((svd[1].square() >= smallest).sum())) for name, svd in svds.items()}
