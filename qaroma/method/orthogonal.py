"""Updates whose directions all have one length: momentum, orthogonalised as Muon does it (Jordan et al., 2024).

A factor (R, N) of rank R is long and narrow, so all the work but two products is done on Gram matrices (R, R), those
of all factors of one rank in one batch.

Dimensions: K factors of one shape, R rank, N features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# a x + b x^3 + c x^5, one after the other, bring every singular value from a hundredth to one to within 27 % of one;
# smaller ones rise by up to 78 times. Each is the best for what the one before leaves (Amsel, Persson, Musco & Gower,
# 2025, "The Polar Express"). Five, to within an eighth from a thousandth on, trained no better (examples/paper).
POLYNOMIALS = (
    (8.093369, -23.620432, 17.446152),
    (3.636586, -2.721927, 0.536546),
    (2.6613, -1.977155, 0.452616),
)


def orthogonalise_(factors: Sequence[Tensor], size: float) -> None:
    """Replace each matrix by its nearest one with orthonormal rows (or columns, where these are fewer), in place.

    Args:
        factors: fp32 matrices; a matrix of zeros stays one.
        size: root mean square of the elements afterwards.
    """
    for of_rank in _grouped(factors, len).values():
        groups = list(_grouped(of_rank, lambda factor: factor.shape[1]).values())
        stacks = [torch.stack(group) for group in groups]
        for stack_KRN in stacks:
            stack_KRN /= torch.linalg.vector_norm(stack_KRN, dim=(1, 2), keepdim=True).clamp_min(1e-30)
        roots_KRR = _inverse_roots(torch.cat([stack_KRN @ stack_KRN.mT for stack_KRN in stacks]))
        roots = torch.split(roots_KRR, [len(group) for group in groups])
        for group, stack_KRN, root_KRR in zip(groups, stacks, roots, strict=True):
            length = size * max(stack_KRN.shape[1:]) ** 0.5
            torch._foreach_copy_(group, list(((length * root_KRR) @ stack_KRN).unbind()))


def _grouped(factors: Sequence[Tensor], key: Callable[[Tensor], int]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for factor in factors:
        found.setdefault(key(factor), []).append(factor)
    return found


def _inverse_roots(gram_KRR: Tensor) -> Tensor:
    """G^(-1/2), about, of matrices whose eigenvalues are at most 1."""
    identity = torch.eye(gram_KRR.shape[-1], dtype=gram_KRR.dtype, device=gram_KRR.device)
    root, remaining = None, gram_KRR
    for number, (a, b, c) in enumerate(POLYNOMIALS, start=1):
        factor = torch.baddbmm(b * remaining, remaining, remaining, alpha=c) + a * identity
        root = factor if root is None else root @ factor
        if number < len(POLYNOMIALS):
            remaining = factor @ remaining @ factor
    assert root is not None
    return root
