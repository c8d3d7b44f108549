"""Trimming: an adapter that has been trained loses the directions that hardly carry anything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qaroma.config.resolved import BudgetGrowthSection
from qaroma.method.adapter import Adapter
from qaroma.method.budget import BudgetSettings
from qaroma.method.factors import Factors
from qaroma.method.joint import JointController
from qaroma.method.trim import trim
from qaroma.training.trimming import trim_method

SHAPES = {"small": (5, 7, 3), "wide": (12, 4, 4), "none": (6, 6, 2)}  # M, N, R


def random_update(dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"small": 1.0, "wide": 0.1, "none": 0.0}
    return {
        name: Factors(
            torch.randn(rank, n, generator=generator).to(dtype),
            (sizes[name] * torch.randn(rank, m, generator=generator)).to(dtype),
        )
        for name, (m, n, rank) in SHAPES.items()
    }


def product(factors: Factors) -> torch.Tensor:
    return factors.B.double().T @ factors.A.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.9])
def test_trimming_is_the_truncation_of_the_block_diagonal_of_all_updates(error: float, dtype: torch.dtype) -> None:
    update = random_update(dtype)
    whole = torch.block_diag(*(product(factors) for factors in update.values()))
    left, values, right = torch.linalg.svd(whole)
    gone = values.square().flip(0).cumsum(0).flip(0).sqrt() <= error * values.square().sum().sqrt() + 1e-12
    naive = left[:, : len(values)] @ torch.diag(values.where(~gone, 0)) @ right[: len(values)]

    smaller = trim(update, error)
    assert list(smaller) == list(update)
    assert sum(factors.rank for factors in smaller.values()) == int((~gone).sum())
    torch.testing.assert_close(torch.block_diag(*map(product, smaller.values())), naive, rtol=0, atol=1e-5)
    assert [factors.shape for factors in smaller.values()] == [factors.shape for factors in update.values()]
    assert smaller["none"].rank == 0


def test_what_is_nothing_is_left_out_and_what_is_needed_stays() -> None:
    zero = {"a": Factors.zero((4, 4), rank=2), "b": Factors.zero((4, 4))}
    assert [factors.rank for factors in trim(zero, 0.03).values()] == [0, 0]
    equal = {"a": Factors(torch.eye(4), torch.eye(4)), "b": Factors(torch.eye(4)[:2], torch.eye(4)[:2])}
    assert [factors.rank for factors in trim(equal, 0.03).values()] == [4, 2]


def trained(trim_share: float) -> tuple[JointController, BudgetGrowthSection]:
    """A layer that was given rank 4 and has learnt one direction of size 1 and three of size 0.01."""
    adapter = Adapter(nn.Sequential(nn.Linear(6, 6, bias=False)), ["0"], alpha=2.0)
    method = JointController(adapter, BudgetSettings(start_rank=4, max_rank=4), learning_rate=1e-2, total_steps=4)
    method.finish()
    directions = torch.eye(6)[:4]
    sizes = torch.tensor([1.0, 0.01, 0.01, 0.01])
    method.load_factors({"0": Factors(directions, directions * sizes[:, None])}, {"0": [4]})
    section = BudgetGrowthSection(
        target_modules="all-linear", alpha=2.0, dropout=0.0, warmup=1, min_lr_ratio=0.1, inner_rank=1,
        schedule="budget", window="all", start_rank=4, max_rank=4, measured_rate=False, trim=trim_share,
    )  # fmt: skip
    return method, section


@pytest.mark.parametrize(
    ("metric", "best", "value", "taken"),
    [
        ("loss", 2.0, 2.001, True),
        ("loss", 2.0, 2.003, False),
        ("loss", 0.01, 0.0105, True),  # half a thousandth is nothing, however small the loss
        ("loss", 2.0, 1.5, True),
        ("loss", 2.0, math.nan, False),
        ("accuracy", 0.9, 0.8995, True),
        ("accuracy", 0.9, 0.89, False),
    ],
)
def test_validation_has_the_last_word(metric: str, best: float, value: float, taken: bool) -> None:
    method, growth = trained(0.03)
    before = method.factors()["0"]
    found = trim_method(method, growth, lambda: {metric: value}, metric=metric, best=best)
    assert found is not None
    assert (found.before, found.after, found.taken) == (4, 1 if taken else 4, taken)
    assert method.ranks() == {"0": 1 if taken else 4}
    if not taken:
        assert all(torch.equal(*pair) for pair in zip(before, method.factors()["0"], strict=True))


def test_what_is_not_measured_is_trimmed_and_what_asks_for_none_is_not() -> None:
    method, growth = trained(0.03)
    found = trim_method(method, growth, None, metric="loss", best=None)
    assert found is not None
    assert (found.after, found.figures) == (1, {})
    assert trim_method(method, growth, None, metric="loss", best=None) is None  # nothing is left to leave out
    assert trim_method(*trained(0.0), None, metric="loss", best=None) is None
