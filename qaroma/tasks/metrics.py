"""Figures of merit of classification and regression, always over a whole data set.

Dimensions: S examples, C classes. Tested against scikit-learn and scipy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(predicted_S: Tensor, true_S: Tensor, classes: int) -> Tensor:
    """(C, C) counts: rows are the true classes, columns the predicted ones."""
    cells = true_S.long() * classes + predicted_S.long()
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def accuracy(counts_CC: Tensor) -> float:
    """Share of the examples on the diagonal."""
    return (counts_CC.diagonal().sum() / counts_CC.sum()).item()


def f1(counts_CC: Tensor) -> float:
    """F1 of class 1 where there are two classes (GLUE's), else the unweighted mean over classes (macro).

    A class that is neither there nor predicted has F1 0, as in scikit-learn.
    """
    counts = counts_CC.double()
    right, predicted, true = counts.diagonal(), counts.sum(0), counts.sum(1)
    per_class = torch.where(predicted + true > 0, 2 * right / (predicted + true), 0.0)
    return (per_class[1] if len(per_class) == 2 else per_class.mean()).item()


def matthews(counts_CC: Tensor) -> float:
    """Matthews correlation coefficient; 0 where either side is constant."""
    counts = counts_CC.double()
    total, right = counts.sum(), counts.diagonal().sum()
    predicted, true = counts.sum(0), counts.sum(1)
    spread = (total**2 - predicted.square().sum()) * (total**2 - true.square().sum())
    covariance = right * total - (predicted * true).sum()
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


def pearson(x_S: Tensor, y_S: Tensor) -> float:
    """Linear correlation; 0 where either side is constant."""
    x, y = (t.double() - t.double().mean() for t in (x_S, y_S))
    spread = x.norm() * y.norm()
    return ((x * y).sum() / spread).item() if spread > 0 else 0.0


def spearman(x_S: Tensor, y_S: Tensor) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    return pearson(_ranks(x_S), _ranks(y_S))


def _ranks(values_S: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values_S, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_rank: Tensor = last - (counts - 1) / 2
    return mean_rank[inverse]
