"""Causal language modelling: predict each trained token from what stands before it.

Dimensions: B examples, L sequence length, D hidden size, T trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.data.encode import Example
from qaroma.engine.loss import LMHead, linear_cross_entropy
from qaroma.tasks.base import IGNORED, Batch


class CausalLM:
    """Task ``causal-lm``: the loss is cross-entropy over the trained tokens.

    Args:
        pad_token_id: fills short rows; any valid id does, since padding is never attended to by a
            real token (it stands on the right) and never trained.
    """

    name = "causal-lm"

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pads on the right to the longest example."""
        length = max(len(e.input_ids) for e in examples)
        input_ids = torch.full((len(examples), length), self.pad_token_id)
        labels = torch.full((len(examples), length), IGNORED)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
        labels[:, 0] = IGNORED
        lengths = tuple(e.lengths or (len(e.input_ids),) for e in examples)
        position_ids = torch.stack([_positions(row, length) for row in lengths])
        trained = (labels.flatten() != IGNORED).nonzero().flatten()
        return Batch(input_ids, labels, position_ids, lengths, trained)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Runs the model to its hidden states; only those that predict a trained token reach the head."""
        hidden_BLD = hidden_states(model, batch)
        hidden_TD = hidden_BLD.flatten(0, 1).index_select(0, batch.trained - 1)
        targets_T = batch.labels.flatten().index_select(0, batch.trained)
        return linear_cross_entropy(hidden_TD, LMHead(model), targets_T), batch.counted

    def metrics(self, loss_sum: float, count: int) -> dict[str, Any]:
        loss = loss_sum / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


def _positions(lengths: Sequence[int], total: int) -> Tensor:
    """Positions that begin at 0 in each sequence of a row; padding belongs to the last.

    transformers takes a restart for the border of a packed sequence, and keeps attention within it.
    """
    padded = [*lengths[:-1], lengths[-1] + total - sum(lengths)]
    return torch.cat([torch.arange(length) for length in padded])


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The model without its head: (B, L, D).

    No attention mask is passed: rows are padded on the right, so causality keeps padding out, and
    the fast causal kernels apply.
    """
    decoder: Any = model.base_model
    output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]
