"""Preferences: of two answers to a question rather the chosen one than the rejected one.

Direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290, eq. 7), with the sigmoid loss.

Dimensions: B pairs, L sequence length, D hidden size, T trained tokens of all their 2 B sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.config.metrics import metrics_of
from qaroma.config.tasks import PREFERENCE
from qaroma.data.example import Pair
from qaroma.engine.loss import LMHead, token_losses
from qaroma.tasks.causal_lm import CausalLM, TokenBatch, trained_states
from qaroma.tasks.evaluation import evaluating, standard_error


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs.

    Attributes:
        sequences: the questions with the chosen answers, then in the same order with the rejected ones.
        trained: tokens of each of these that the loss counts.
        reference_2B: fp32 log-probabilities of the chosen and of the rejected answers by the starting model.
    """

    sequences: TokenBatch
    trained: list[int]
    reference_2B: Tensor

    @property
    def counted(self) -> int:
        """Number of pairs."""
        return self.reference_2B.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.sequences.tokens

    def to(self, device: torch.device) -> PairBatch:
        return replace(
            self,
            sequences=self.sequences.to(device),
            reference_2B=self.reference_2B.to(device, non_blocking=True),
        )


class Preference:
    """Task ``preference``: the loss of a pair is ``-log sigmoid(margin)``.

    The margin is ``beta * (log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected))``, pi being the model
    that trains and ref the one that it started from, each answer's log-probability the sum over its tokens.

    Args:
        beta: how much staying close to the starting model counts.
        pad_token_id: fills short rows, see :class:`~qaroma.tasks.causal_lm.CausalLM`.
    """

    name: str = PREFERENCE
    metric = metrics_of(PREFERENCE)[0]
    told: tuple[str, ...] = metrics_of(PREFERENCE)[1:]

    def __init__(self, beta: float, pad_token_id: int = 0) -> None:
        self.beta, self._plain = beta, CausalLM(pad_token_id)

    def collate(self, examples: Sequence[Pair]) -> PairBatch:
        """Pads on the right to the longest sequence of all."""
        sequences = [*(pair.chosen for pair in examples), *(pair.rejected for pair in examples)]
        reference_2B = torch.tensor([pair.reference for pair in examples], dtype=torch.float32).T
        return PairBatch(self._plain.collate(sequences), [s.trained for s in sequences], reference_2B)

    def log_probabilities(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """Of the chosen and of the rejected answers, (2, B) fp32 in nats; no logits but a chunk's ever live."""
        hidden_TD, targets_T = trained_states(model, batch.sequences)
        losses_T = token_losses(hidden_TD, LMHead(model), targets_T)
        # Sums of slices, where adding by index would be in another order each time on a GPU.
        return torch.stack([-answer.sum() for answer in torch.split(losses_T, batch.trained)]).view(2, -1)

    def margins(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """(B,) fp32."""
        gain_2B = self.log_probabilities(model, batch) - batch.reference_2B
        return self.beta * (gain_2B[0] - gain_2B[1])

    def loss(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, int]:
        return losses_of(self.margins(model, batch)).sum(), batch.counted

    def step(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the sums of what :func:`figures_of` gives."""
        margins_B = self.margins(model, batch)
        return losses_of(margins_B).sum(), {name: each.sum() for name, each in figures_of(margins_B.detach()).items()}

    def evaluate(self, model: nn.Module, batches: Iterable[PairBatch], device: torch.device) -> dict[str, Any]:
        """Loss, accuracy and margin, each the mean over all pairs, and their number."""
        with evaluating(model):
            margins = torch.cat([self.margins(model, batch.to(device)) for batch in batches]).double().cpu()
        losses = losses_of(margins)
        return {
            "loss": losses.mean().item(),
            "loss_error": standard_error(losses, torch.ones_like(losses)),
            **{name: each.mean().item() for name, each in figures_of(margins).items()},
            "examples": len(margins),
        }


def losses_of(margins: Tensor) -> Tensor:
    """The loss of each pair, from its margin."""
    return -F.logsigmoid(margins)


def figures_of(margins: Tensor) -> dict[str, Tensor]:
    """What is told of each pair: whether the chosen answer gained more, a tie being a half, and by how much."""
    return {"accuracy": (margins.sign() + 1) / 2, "margin": margins}


def answer_log_probabilities(
    task: Preference, model: nn.Module, pairs: Sequence[Pair], device: torch.device, *, batch: int
) -> Iterator[list[tuple[float, float]]]:
    """Log-probabilities of both answers by a model as it stands.

    Args:
        task: of the pairs.
        model: put into evaluation mode while a batch is computed.
        pairs: in the order to take them.
        device: of the model.
        batch: pairs at a time.

    Yields:
        Those of one batch of pairs after the other: in nats, of the chosen and of the rejected answer.
    """
    for start in range(0, len(pairs), batch):
        with evaluating(model):
            found_2B = task.log_probabilities(model, task.collate(pairs[start : start + batch]).to(device))
        yield [(chosen, rejected) for chosen, rejected in found_2B.T.tolist()]
