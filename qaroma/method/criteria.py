"""Norms behind AROMA's two criteria, from factors alone, in fp64.

Dimensions: N in_features, M out_features, r rank of a component, R rank of several.
With rank-major factors the product is D = B^T A (M, N); no function here forms it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaroma.method.pieces import Pieces, every_piece

# Rows of a dense weight that are cast to fp64 at a time: bounds the transient memory.
ROWS = 1024


def inner_product(A_rN: Tensor, B_rM: Tensor, C_RN: Tensor, D_RM: Tensor) -> Tensor:
    """Frobenius inner product <B^T A, D^T C> = sum((A C^T) * (B D^T)).

    Args:
        A_rN, B_rM: factors of the first product.
        C_RN, D_RM: factors of the second.

    Returns:
        fp64 scalar on the factors' device.
    """
    return ((A_rN.double() @ C_RN.double().T) * (B_rM.double() @ D_RM.double().T)).sum()


def product_norm_sq(A_rN: Tensor, B_rM: Tensor) -> Tensor:
    """``||B^T A||_F^2 = tr((A A^T)(B B^T))``, an fp64 scalar."""
    return inner_product(A_rN, B_rM, A_rN, B_rM)


def change_norm_sq(A_rN: Tensor, B_rM: Tensor, A_old_rN: Tensor, B_old_rM: Tensor) -> Tensor:
    """``||B^T A - B_old^T A_old||_F^2`` (criterion ``product``), an fp64 scalar.

    The difference is itself a product of the stacked factors [A; A_old] and [B; -B_old]. Written as
    ``B^T (A - A_old) + (B - B_old)^T A_old`` it loses no digits where the change is small.
    """
    A, A_old, B, B_old = (t.double() for t in (A_rN, A_old_rN, B_rM, B_old_rM))
    left, right = torch.cat([A - A_old, A_old]), torch.cat([B, B - B_old])
    return product_norm_sq(left, right).clamp_min(0.0)


def dense_norm_sq(W_MN: Tensor, pieces: Pieces = every_piece) -> Tensor:
    """``||W||_F^2`` as an fp64 scalar, in blocks of rows."""
    total = torch.zeros((), dtype=torch.float64, device=W_MN.device)
    for rows in pieces(len(W_MN), ROWS):
        total += W_MN[rows].double().square().sum()
    return total


def dense_inner_product(W_MN: Tensor, A_rN: Tensor, B_rM: Tensor, pieces: Pieces = every_piece) -> Tensor:
    """``<W, B^T A> = tr(B W A^T)`` as an fp64 scalar: one skinny product, in blocks of rows."""
    A_Nr, B_Mr = A_rN.double().T, B_rM.double().T
    total = torch.zeros((), dtype=torch.float64, device=W_MN.device)
    for rows in pieces(len(W_MN), ROWS):
        total += ((W_MN[rows].double() @ A_Nr) * B_Mr[rows]).sum()
    return total
