"""Figures of merit equal scikit-learn's and scipy's, on random data and on the awkward cases."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from qaroma.tasks import metrics


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_classification_figures_equal_scikit_learns(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, classes, (83,), generator=generator)
    predicted = torch.where(torch.rand(83, generator=generator) < 0.6, true, true.roll(1))
    counts = metrics.confusion(predicted, true, classes)
    average = "binary" if classes == 2 else "macro"
    assert metrics.accuracy(counts) == pytest.approx(sk.accuracy_score(true, predicted))
    assert metrics.f1(counts) == pytest.approx(sk.f1_score(true, predicted, average=average))
    assert metrics.matthews(counts) == pytest.approx(sk.matthews_corrcoef(true, predicted))


@pytest.mark.parametrize("predicted", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
def test_constant_predictions(predicted: list[int]) -> None:
    true, guess = torch.tensor([0, 1, 1, 1]), torch.tensor(predicted)
    counts = metrics.confusion(guess, true, 2)
    assert metrics.f1(counts) == pytest.approx(sk.f1_score(true, guess, zero_division=0))
    assert metrics.matthews(counts) == pytest.approx(sk.matthews_corrcoef(true, guess))


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_scipys_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 11, (97,), generator=generator) / 2  # STS-B's labels repeat
    x = y + torch.randn(97, generator=generator)
    x[:20] = x[0]
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_constant_side_correlates_with_nothing() -> None:
    assert metrics.pearson(torch.ones(5), torch.arange(5.0)) == 0.0
    assert metrics.spearman(torch.ones(5), torch.arange(5.0)) == 0.0
