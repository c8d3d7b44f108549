"""Effective rank and similarity of components against dense twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qaroma.method.spectrum import component_cosines, effective_rank, product_svd


def dense_effective_rank(A: Tensor, B: Tensor) -> float:
    values = torch.linalg.svdvals(B.double().T @ A.double())
    shares = [v / sum(values.tolist()) for v in values.tolist()]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@pytest.mark.parametrize(("rank", "N", "M"), [(1, 40, 24), (5, 40, 24), (30, 40, 24), (50, 40, 24)])
def test_effective_rank_equals_its_dense_twin(rank: int, N: int, M: int) -> None:
    A, B = torch.randn(rank, N), torch.randn(rank, M) * torch.logspace(0, -3, rank)[:, None]
    assert effective_rank(A, B) == pytest.approx(dense_effective_rank(A, B), rel=1e-6)
    assert effective_rank(A.bfloat16(), B.bfloat16() * 1e-6) == pytest.approx(
        dense_effective_rank(A.bfloat16(), B.bfloat16() * 1e-6), rel=1e-6
    )


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_equal_orthogonal_directions_count_in_full_and_equal_ones_once(rank: int) -> None:
    A, B = (torch.linalg.qr(torch.randn(n, rank))[0].T for n in (40, 24))
    assert effective_rank(A, 3 * B) == pytest.approx(rank, rel=1e-6)
    repeated = A[:1].expand(rank, -1), B[:1].expand(rank, -1)
    assert effective_rank(*repeated) == pytest.approx(1.0, abs=1e-5)


def test_no_update_has_no_rank() -> None:
    assert effective_rank(torch.zeros(0, 40), torch.zeros(0, 24)) == 0.0
    assert effective_rank(torch.randn(3, 40), torch.zeros(3, 24)) == 0.0


@pytest.mark.parametrize("rank", [1, 6, 30])
def test_product_svd_is_the_products(rank: int) -> None:
    A, B = torch.randn(rank, 40), torch.randn(rank, 24)
    U, values, V = product_svd(A, B)
    assert U.shape[1] == len(values) == V.shape[0] == min(rank, 24)
    torch.testing.assert_close((U * values) @ V, B.double().T @ A.double())
    torch.testing.assert_close(values, torch.linalg.svdvals(B.double().T @ A.double())[: len(values)])


@pytest.mark.parametrize("components", [[1, 1, 1], [2, 1, 3], [4]])
def test_cosines_equal_their_dense_twin(components: list[int]) -> None:
    A, B = torch.randn(sum(components), 40), torch.randn(sum(components), 24) * 1e-5
    A[-1] = A[0] + 0.1 * A[-1]  # so that not all are near zero
    B[-1] = -B[0]
    parts = zip(A.double().split(components), B.double().split(components), strict=True)
    flat = torch.stack([(b.T @ a).flatten() for a, b in parts])
    flat = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(component_cosines(A, B, components), flat @ flat.T)


def test_a_component_of_no_size_is_similar_to_none() -> None:
    A, B = torch.randn(2, 40), torch.randn(2, 24)
    B[1] = 0
    assert component_cosines(A, B, [1, 1]).tolist() == [[pytest.approx(1.0), 0.0], [0.0, 0.0]]
    assert component_cosines(A[:0], B[:0], []).shape == (0, 0)
