"""Learning rates from dimensions, and the factor that a run measures on them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from qaroma.method.optimiser import FlatAdamW
from qaroma.method.rate import (
    CLIMB,
    FASTEST,
    LARGEST_FACTOR,
    LEAST_CLIMB,
    NOISE_SIZE,
    SMALL_START,
    MeasuredRate,
    noise_size,
    rate_for,
)


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize(("width", "std"), [(384, 0.05), (576, 0.19), (4096, 0.0165)])
def test_the_rate_is_the_one_at_which_noise_has_the_size_wanted(rank: int, width: int, std: float) -> None:
    dimensions = {"steps": 240, "width": width, "weight_std": std, "scale": 2.0}
    rate = rate_for(**dimensions, rank=rank)
    assert noise_size(rate, **dimensions) * math.sqrt(rank) == pytest.approx(NOISE_SIZE)


@pytest.mark.parametrize(
    ("width", "std", "steps", "rank", "rate"),
    [
        (576, 0.19, 60, 1, 9.3e-3),  # SmolLM2-135M
        (576, 0.19, 60, 8, 5.0e-3),
        (384, 0.05, 240, 1, 1.8e-3),  # MiniLM-L6
        (384, 0.05, 240, 8, 7.4e-4),
        (4096, 0.0165, 100, 8, 1.0e-3),  # LLaMA-3-8B
    ],
)
def test_the_rates_of_models_that_are_known(width: int, std: float, steps: int, rank: int, rate: float) -> None:
    found = rate_for(steps=steps, width=width, weight_std=std, scale=2.0, rank=rank)
    assert found == pytest.approx(rate, rel=0.03)


def test_noise_has_that_size() -> None:
    """By AdamW on gradients of pure noise, beside a weight of known size."""
    steps, width, height, std, rate = 200, 256, 128, 0.05, 2e-3
    generator = torch.Generator().manual_seed(0)
    A = nn.Parameter(torch.empty(1, width).uniform_(-(width**-0.5), width**-0.5, generator=generator))
    B = nn.Parameter(torch.zeros(1, height))
    optimiser = FlatAdamW({"m": [A, B]})
    for step in range(steps):
        optimiser.gradients.normal_(generator=generator)
        optimiser.step({"m": [rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))]})
    found = 2.0 * (B.T @ A).norm().item() / (std * math.sqrt(width * height))
    wanted = noise_size(rate, steps=steps, width=width, weight_std=std, scale=2.0)
    assert found == pytest.approx(wanted, rel=0.3)


def observed(rate: MeasuredRate, cosine: float) -> list[float]:
    factors = [rate.factor]
    for step in range(1, rate.steps):
        rate.observe(step, cosine, 1.0)
        factors.append(rate.factor)
    return factors


def test_a_rate_that_is_not_measured_stays_as_it_was_given() -> None:
    rate = MeasuredRate(0)
    assert (rate.factor, rate.measuring(0)) == (1.0, False)
    assert [MeasuredRate(3).measuring(step) for step in (0, 2, 3)] == [True, True, False]


def test_the_factor_rises_while_updates_are_too_short_and_falls_where_they_are_too_long() -> None:
    assert observed(MeasuredRate(12), 0.5)[:-1] == sorted(observed(MeasuredRate(12), 0.5)[:-1])
    falling = observed(MeasuredRate(12), -0.5)
    assert falling[:-1] == sorted(falling[:-1], reverse=True)
    steps = [math.log(a / b) for a, b in itertools.pairwise(falling)]
    assert steps == sorted(steps, reverse=True)  # ever more slowly, once it was enough
    assert observed(MeasuredRate(200), 1.0)[120] == LARGEST_FACTOR
    assert observed(MeasuredRate(2000), -1.0)[1500] == 1 / LARGEST_FACTOR


def test_the_factor_climbs_the_more_slowly_the_longer_a_run_is() -> None:
    """What a run learns first stands any rate: a long run that climbed within a few steps would end far too high."""
    after = {steps: observed(MeasuredRate(steps), 1.0)[8] / SMALL_START for steps in (20, 50, 100, 1000)}
    assert after[20] == pytest.approx(math.exp(8 * FASTEST), rel=1e-3)
    assert after[50] == pytest.approx(math.exp(8 * CLIMB / 50), rel=1e-3)
    assert after[100] == after[1000] == pytest.approx(math.exp(8 * LEAST_CLIMB), rel=1e-3)


def test_a_cosine_that_always_says_too_long_costs_half_of_the_rate_and_not_all() -> None:
    rate = MeasuredRate(400)
    for step in range(40):
        rate.observe(step, 0.2, 1.0)
    largest = rate.factor
    for step in range(40, 400):
        rate.observe(step, -0.08, 1.0)
    assert rate.factor == pytest.approx(largest / 2, rel=0.15)
    stays = MeasuredRate(400, first_losses=[1.0] * 5)
    for step in range(60):
        stays.observe(step, -0.08, 2.0)
    assert stays.factor == 1 / LARGEST_FACTOR  # where the loss is above the first one it falls as far as it takes


def test_a_risen_loss_moves_the_factor_down_whatever_the_cosine_says() -> None:
    rate = MeasuredRate(10, first_losses=[1.0] * 5)
    before = rate.factor
    rate.observe(1, 1.0, 1.3)
    assert rate.factor == pytest.approx(before * math.exp(-FASTEST))


def test_one_easy_batch_at_first_does_not_make_all_others_a_risen_loss() -> None:
    """Seen on Alpaca's text: a first loss a fifth below the others held the rate at a fifth of the best one."""
    lucky, usual = MeasuredRate(60), MeasuredRate(60)
    lucky.observe(1, 0.1, 0.8)
    usual.observe(1, 0.1, 1.0)
    for step in range(2, 60):
        loss = 1.0 + 0.1 * (-1) ** step
        lucky.observe(step, 0.1, loss)
        usual.observe(step, 0.1, loss)
    assert lucky.factor == usual.factor > 10 * SMALL_START


def test_a_loss_that_climbs_from_the_first_step_on_has_risen_soon() -> None:
    rate = MeasuredRate(60)
    for step in range(1, 12):
        rate.observe(step, 0.1, 1.5**step)
    assert rate.factor < SMALL_START


def test_the_factor_that_stays_is_the_geometric_mean_of_the_second_half() -> None:
    rate, seen = MeasuredRate(8), []
    for step, cosine in enumerate((0.3, 0.1, -0.1, 0.05, -0.2, 0.0, 0.4), start=1):
        rate.observe(step, cosine, 1.0)
        if step in (4, 5, 6):
            seen.append(rate.factor)
    # The last step's own factor is not shown: it is what the mean and the others leave of it.
    last = rate.factor**4 / math.prod(seen)
    assert 1.0 < last / seen[-1] < math.exp(FASTEST)
    assert rate.count == 4


def agreement_by_hand(optimiser: FlatAdamW) -> Tensor:
    gradients = torch.cat([p.grad.reshape(-1) for ps in optimiser.groups.values() for p in ps])
    assert optimiser.last_update is not None
    return torch.dot(gradients, optimiser.last_update) / (gradients.norm() * optimiser.last_update.norm())


def test_agreement_is_the_cosine_of_the_gradient_and_what_was_subtracted() -> None:
    torch.manual_seed(0)
    groups = {name: [nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(2, 3))] for name in "ab"}
    optimiser = FlatAdamW(groups, parts={"a": [2], "b": [2]})
    optimiser.keep_updates(True)
    optimiser.gradients.normal_()
    assert optimiser.agreement().item() == 0.0  # nothing was done yet
    before = optimiser.values.clone()
    optimiser.step({"a": [1e-2], "b": [3e-2]})
    torch.testing.assert_close(optimiser.last_update, before - optimiser.values, rtol=1e-4, atol=1e-7)
    assert optimiser.agreement().item() > 0.5  # the same gradient again
    optimiser.gradients.normal_()
    torch.testing.assert_close(optimiser.agreement(), agreement_by_hand(optimiser))
    # A component that begins was not updated: it adds to the gradient's length alone.
    dot = torch.dot(optimiser.gradients, optimiser.last_update)
    optimiser.grow({"a": [torch.randn(1, 5), torch.randn(1, 3)]}, gone={"a": 0})
    assert optimiser.last_update is not None
    assert len(optimiser.last_update) == len(optimiser.values) == 40
    torch.testing.assert_close(torch.dot(optimiser.gradients, optimiser.last_update), dot)
    optimiser.gradients.normal_()
    torch.testing.assert_close(optimiser.agreement(), agreement_by_hand(optimiser))
    optimiser.drop(["a"])
    torch.testing.assert_close(optimiser.agreement(), agreement_by_hand(optimiser))
    optimiser.keep_updates(False)
    assert "last_update" not in optimiser.buffers()
