"""What the singular values of an update say, from its factors alone; no function here forms M x N.

Dimensions: N in_features, M out_features, R rank, K = min(M, N, R), P components.
With rank-major factors the update is B^T A (M, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qaroma.method.factors import Factors


def product_svd(A_RN: Tensor, B_RM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``B^T A``, by QR of both factors and an SVD of at most R x R.

    Equivalent to ``torch.linalg.svd(B.T @ A, full_matrices=False)`` in fp64, less what is zero
    beyond the R-th singular value.

    Args:
        A_RN, B_RM: factors of any dtype.

    Returns:
        Left vectors (M, K), singular values (K,) from large to small, right vectors (K, N); fp64.
    """
    Q_MK, left = torch.linalg.qr(B_RM.double().T)
    Q_NK, right = torch.linalg.qr(A_RN.double().T)
    U, values_K, V = torch.linalg.svd(left @ right.T, full_matrices=False)
    return Q_MK @ U, values_K, V @ Q_NK.T


def truncated(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> Factors:
    """The leading directions as fp32 factors; each singular value is shared by both, as its square root.

    Args:
        svd: of an update, as :func:`product_svd` gives it.
        rank: K', how many directions to keep.

    Returns:
        A (K', N) and B (K', M).
    """
    left_MK, values_K, right_KN = svd
    root_K = values_K[:rank].sqrt()
    A = root_K[:, None] * right_KN[:rank]
    B = root_K[:, None] * left_MK[:, :rank].T
    return Factors(A.float().contiguous(), B.float().contiguous())


def effective_rank(A_RN: Tensor, B_RM: Tensor) -> float:
    """exp of the Shannon entropy of the singular values, normalised to sum 1 (Roy & Vetterli, 2007).

    Args:
        A_RN, B_RM: factors of the update.

    Returns:
        Between 1 and R; 0 for an update of rank 0.
    """
    _, values_K, _ = product_svd(A_RN, B_RM)
    total = values_K.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values_K / total).sum().exp())


def component_cosines(A_RN: Tensor, B_RM: Tensor, components: Sequence[int]) -> Tensor:
    """Frobenius cosine similarity between the components of an update (the paper's Figure 4).

    Equivalent to ``<D_p, D_q> / (||D_p|| ||D_q||)`` with D_p = B_p^T A_p formed.

    Args:
        A_RN, B_RM: factors of the update, its components one after the other.
        components: their P inner ranks, which sum to R.

    Returns:
        (P, P), fp64 on the factors' device; 0 where a component is zero.
    """
    places_P = torch.arange(len(components))
    owner_R = torch.repeat_interleave(places_P, torch.tensor(components, dtype=torch.long), output_size=sum(components))
    belongs_PR = (owner_R == places_P[:, None]).to(A_RN.device, torch.float64)
    A, B = A_RN.double(), B_RM.double()
    inner_PP = belongs_PR @ ((A @ A.T) * (B @ B.T)) @ belongs_PR.T
    norm_P = inner_PP.diagonal().clamp_min(0).sqrt()
    scale_PP = norm_P[:, None] * norm_P
    return torch.where(scale_PP > 0, inner_PP / scale_PP, 0.0)
