"""Planted ranks: 24 layers that each lack an update of known rank, to see what rank is learnt.

Every layer is asked by itself, for its own random inputs, so that no layer can do another's work.

Dimensions: K layers, T rows, N width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.compare.suite.beds import Bed, Place
from qaroma.compare.suite.bench import Bench, step_generator
from qaroma.config.decisions import DataFacts
from qaroma.method.factors import Update
from qaroma.method.spectrum import product_svd
from qaroma.method.targets import find_targets
from qaroma.model.facts import facts_of_module
from qaroma.tasks.evaluation import evaluating

LAYERS, WIDTH, LARGEST = 24, 64, 8
STRENGTH = 2.0  # every singular value of a planted update; the weights' own largest is about 2
NOISE = 0.3  # standard deviation of what no update explains, beside outputs of about 1
COUNTED = 0.25  # a direction counts as learnt from this share of a planted singular value
ROWS = 4096


class PlantedModel(nn.Module):
    """Independent linear layers: (K, T, N) -> (K, T, N)."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        for layer in self.layers:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.data.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)

    def weights(self) -> Tensor:
        """(K, N, N), a copy."""
        return torch.stack([p.detach() for p in self.parameters()])

    def forward(self, x_KTN: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer, x in zip(self.layers, x_KTN, strict=True)])


def planted_ranks(seed: int) -> list[int]:
    """The rank of each layer's update: 0 to 8, nearly equally often, in random order."""
    order = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed)).tolist()
    return [place % (LARGEST + 1) for place in order]


def set_up_planted(bed: Bed, place: Place, seed: int) -> Bench:
    """Least squares against layers with planted updates, with noise on the targets."""
    generator = torch.Generator().manual_seed(97 + seed)
    model, ranks = PlantedModel(generator), planted_ranks(seed)
    updates_KNN = torch.stack([_update(rank, generator) for rank in ranks])
    weights_KNN = model.weights() + updates_KNN

    def rows(count: int, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        x_KTN = torch.randn(LAYERS, count, WIDTH, generator=drawn)
        noise = NOISE * torch.randn(LAYERS, count, WIDTH, generator=drawn)
        return x_KTN, x_KTN @ weights_KNN.mT + noise

    def error(x_KTN: Tensor, y_KTN: Tensor) -> Tensor:
        difference: Tensor = model(x_KTN) - y_KTN
        return difference.square().mean()

    def held_out_error(count: int, number: int) -> float:
        with evaluating(model):
            return error(*rows(count, torch.Generator().manual_seed(number))).item()

    return Bench(
        model,
        DataFacts(ROWS, [1] * ROWS, None, validation_rows=256, model=facts_of_module(model, find_targets(model))),
        loss=lambda step: error(*rows(bed.batch, step_generator(seed, step % (ROWS // bed.batch)))),
        validate=lambda: {"loss": held_out_error(256, 5), "loss_error": math.inf},
        score=lambda: held_out_error(1024, 55),
        learnt=lambda factors: learnt_ranks(factors, ranks),
    )


def learnt_ranks(factors: Update, planted: list[int]) -> dict[str, Any]:
    """Planted ranks beside the numerical ranks of what was learnt, and beside the ranks that were given.

    Args:
        factors: of each layer, in the model's order.
        planted: the true ranks.
    """
    learnt, given = [], []
    for A, B in factors.values():
        given.append(len(A))
        learnt.append(int((product_svd(A, B)[1] > COUNTED * STRENGTH).sum()) if len(A) else 0)
    return {"planted": planted, "learnt": learnt, "given": given}


def _update(rank: int, generator: torch.Generator) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][:, :rank] for _ in range(2))
    update: Tensor = STRENGTH * left @ right.T
    return update
