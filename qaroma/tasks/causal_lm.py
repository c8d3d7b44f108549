"""Causal language modelling: predict each trained token from what stands before it.

Dimensions: B examples, L sequence length, D hidden size, T trained tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.data.encode import Example
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
        # Restarts nowhere: transformers takes a restart for the border of a packed sequence.
        position_ids = torch.arange(length).expand(len(examples), length)
        lengths = tuple((len(e.input_ids),) for e in examples)
        return Batch(input_ids, labels, position_ids, lengths, int((labels != IGNORED).sum()))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Runs the model to its hidden states, then :func:`cross_entropy_sum`."""
        hidden_BLD = hidden_states(model, batch)
        return cross_entropy_sum(hidden_BLD, LMHead(model), batch.labels), batch.counted

    def metrics(self, loss_sum: float, count: int) -> dict[str, Any]:
        loss = loss_sum / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


class LMHead:
    """The output head of a causal model with what its config does to the logits.

    ``model.forward`` may scale logits (Granite, Cohere) or cap them softly (Gemma 2); calling a
    model to its hidden states only must not lose that.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.projection: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.multiplier = float(getattr(config, "logit_scale", None) or 1.0)
        self.multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V) in fp32."""
        logits: Tensor = self.projection(hidden).float()
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The model without its head: (B, L, D).

    No attention mask is passed: rows are padded on the right, so causality keeps padding out, and
    the fast causal kernels apply.
    """
    decoder: Any = model.base_model
    output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def cross_entropy_sum(hidden_BLD: Tensor, head: LMHead, labels_BL: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over the trained ones; others never reach the head."""
    targets_BL = labels_BL[:, 1:]
    trained = targets_BL != IGNORED
    hidden_TD = hidden_BLD[:, :-1][trained]
    return F.cross_entropy(head(hidden_TD), targets_BL[trained], reduction="sum")
