"""Causal language modelling: predict each trained token from what stands before it.

Dimensions: B examples, L sequence length, D hidden size, T trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.data.encode import IGNORED, Example
from qaroma.engine.loss import LMHead, linear_cross_entropy
from qaroma.engine.packed import packing_told
from qaroma.engine.placement import ids_at_hand
from qaroma.errors import QaromaError
from qaroma.method.head import backbone
from qaroma.model.devices import to_device
from qaroma.model.documents import keep_documents_apart
from qaroma.tasks.evaluation import evaluate_loss

# The head is asked where its largest logit is this: a soft cap bends nothing that lies far below it.
LARGEST_LOGIT = 100.0
# Of the logits' norm: ten times what bf16 rounds away, a tenth of what a scale, a cap or a bias changes.
HEAD_TOLERANCE = 0.02
# Of a sequence's hidden states: what sees another sequence changes by a tenth, what does not by the rounding of experts
# that meet other tokens.
APART_TOLERANCE = 0.02
APART_TOKENS = 8  # of each sequence


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of sequences.

    Attributes:
        input_ids: (B, L) int64, padded on the right.
        labels: (B, L) int64, aligned with ``input_ids``; ``IGNORED`` where nothing is trained,
            always so at the first token of a sequence.
        position_ids: (B, L) int64, from 0 within each sequence (padding counts on).
        lengths: for each row the lengths of the sequences that lie in it one after the other.
        trained: (T,) int64, where the counted tokens stand in the flattened labels; made with the
            batch, so that no loss has to ask the device.
        weights: (T,) fp32, the factor of each counted token's loss; None where all are 1.
        ids_on_host: ``input_ids`` of a batch that was brought to a card, as they were before.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[tuple[int, ...], ...]
    trained: Tensor
    weights: Tensor | None = None
    ids_on_host: Tensor | None = None

    @property
    def counted(self) -> int:
        """Number of targets that the loss counts."""
        return self.trained.shape[0]

    def to(self, device: torch.device) -> TokenBatch:
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            labels=to_device(self.labels, device),
            position_ids=to_device(self.position_ids, device),
            trained=to_device(self.trained, device),
            weights=None if self.weights is None else to_device(self.weights, device),
            ids_on_host=None if device.type == "cpu" else self.input_ids,
        )

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(sum(row) for row in self.lengths)

    @property
    def documents(self) -> tuple[int, ...]:
        """Lengths of the sequences of all rows, padding included; empty where each is alone in its row."""
        if all(len(row) == 1 for row in self.lengths):
            return ()
        return tuple(length for row in self.lengths for length in _padded(row, self.input_ids.shape[1]))


class CausalLM:
    """Task ``causal-lm``: the loss is cross-entropy over the trained tokens.

    Args:
        pad_token_id: fills short rows; any valid id does, since padding is never attended to by a
            real token (it stands on the right) and never trained.
    """

    name = "causal-lm"
    metric = "loss"
    told: tuple[str, ...] = ()

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def collate(self, examples: Sequence[Example]) -> TokenBatch:
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
        weights = None
        if any(e.loss_weights for e in examples):
            factors = torch.ones(labels.shape)
            for row, example in enumerate(examples):
                if example.loss_weights:
                    factors[row, : len(example.loss_weights)] = torch.tensor(example.loss_weights)
            weights = factors.flatten().index_select(0, trained)
        return TokenBatch(input_ids, labels, position_ids, lengths, trained, weights)

    def loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, int]:
        """Runs the model to its hidden states; only those that predict a trained token reach the head."""
        hidden_TD, targets_T = trained_states(model, batch)
        return linear_cross_entropy(hidden_TD, LMHead(model), targets_T, batch.weights), batch.counted

    def step(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; nothing is told beside it."""
        return self.loss(model, batch)[0], {}

    def evaluate(self, model: nn.Module, batches: Iterable[TokenBatch], device: torch.device) -> dict[str, Any]:
        """Loss per token, perplexity, and the number of tokens."""
        total = evaluate_loss(lambda batch: self.loss(model, batch.to(device)), batches, model)
        return {
            "loss": total.mean,
            "loss_error": total.error,
            "perplexity": math.exp(min(total.mean, 700.0)),
            "tokens": total.count,
        }


def _positions(lengths: Sequence[int], total: int) -> Tensor:
    """Positions that begin at 0 in each sequence of a row; padding belongs to the last.

    transformers takes a restart for the border of a packed sequence, and keeps attention within it.
    """
    return torch.cat([torch.arange(length) for length in _padded(lengths, total)])


def _padded(lengths: Sequence[int], total: int) -> list[int]:
    """The lengths in a row of ``total`` tokens."""
    return [*lengths[:-1], lengths[-1] + total - sum(lengths)]


def hidden_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The model without its head: (B, L, D).

    No attention mask is passed: rows are padded on the right, so causality keeps padding out, and
    the fast causal kernels apply.
    """
    with packing_told(model, batch.documents), ids_at_hand(model, batch.ids_on_host):
        output = backbone(model)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def trained_states(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a trained token, (T, D), and these tokens, (T,)."""
    hidden_TD = hidden_states(model, batch).flatten(0, 1).index_select(0, batch.trained - 1)
    return hidden_TD, batch.labels.flatten().index_select(0, batch.trained)


@torch.no_grad()
def require_known_head(model: Any) -> None:
    """Compare one token's logits by the model's own forward pass with those that the loss would see.

    The loss calls the decoder and the head apart (:class:`~qaroma.engine.loss.LMHead`), so what a
    family does to its logits beside must be known here. The hidden state is made long enough for a
    soft cap to show.

    Args:
        model: in eval mode, on its device; a model without an output head, as a classifier, passes.

    Raises:
        QaromaError: the logits differ, so that the model would be trained on another loss than its own.
    """
    projection = model.get_output_embeddings()
    if projection is None:
        return
    head = LMHead(model)
    token = head.vocabulary // 2  # an ordinary one in any vocabulary; padding may be embedded as zeros
    example = Example([token], [IGNORED], "", ())
    batch = CausalLM().collate([example]).to(projection.weight.device)
    hidden_1D = hidden_states(model, batch)[:, -1]
    factor = LARGEST_LOGIT / head.logits(hidden_1D).abs().max().clamp_min(1e-6).item()
    ours = head.logits(hidden_1D * factor)
    hook = projection.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        hook.remove()
    theirs = output.logits[:, -1].float()
    # What is not a number is no difference: the loss of the first step will stop the run and say why.
    if theirs.shape == ours.shape and not (theirs - ours).norm() > HEAD_TOLERANCE * theirs.norm():
        return
    family = getattr(model.config, "model_type", type(model).__name__)
    raise QaromaError(
        f"got a model of family {family}, which does something to its logits that qaroma does not know (one token's "
        "differ from those of its output head); training would optimise another loss than the model's own. "
        "Name another base with --model"
    )


@torch.no_grad()
def require_apart(model: Any) -> None:
    """Let a model keep the sequences of a packed row apart, and see that it does.

    Two rows differ in their first sequence alone: what the model makes of their second one must be the same.

    Args:
        model: as :func:`require_known_head` takes it; changed in place.

    Raises:
        QaromaError: a model whose sequences see each other, as state-space layers and some positions let them.
    """
    keep_documents_apart(model)
    vocabulary = LMHead(model).vocabulary
    second = [vocabulary // 2] * APART_TOKENS
    rows = [[vocabulary // part] * APART_TOKENS + second for part in (3, 4)]
    lengths = (APART_TOKENS, APART_TOKENS)
    batch = CausalLM().collate([Example(ids, [IGNORED] * len(ids), "", lengths=lengths) for ids in rows])
    try:
        states_2LD = hidden_states(model, batch.to(model.get_output_embeddings().weight.device))[:, APART_TOKENS:]
    except (AttributeError, TypeError):  # its layers look into the mask
        apart = False
    else:
        one, other = states_2LD.float()
        apart = not (one - other).norm() > APART_TOLERANCE * one.norm()
    if not apart:
        raise QaromaError(
            f"got data.packing for a model of family {model.config.model_type}, which cannot keep the sequences of one "
            "row apart: each would learn from those before it. Leave data.packing out"
        )
