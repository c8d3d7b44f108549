"""Linear cross-entropy in chunks: nothing of size tokens x vocabulary ever lives.

Dimensions: T trained tokens, C tokens of a chunk, D hidden size, V vocabulary, U rows of a vocabulary block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.method.dequantise import block_maxima, dense_rows, dense_weight

CHUNK_BYTES = 128 * 2**20  # of fp32 logits alive at a time
BLOCK_ROWS = 4096  # rows of the head that are dense at a time: a multiple of any quantisation block


class LMHead:
    """The output head of a causal model with what its config does to the logits.

    ``model.forward`` may scale logits (Granite, Cohere) or cap them softly (Gemma 2); calling a
    model to its hidden states only must not lose that. The head is frozen; it may lie in 4 bits.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.projection: nn.Module = model.get_output_embeddings()
        self.vocabulary: int = self.projection.out_features
        self.packed = getattr(self.projection.weight, "quant_state", None) is not None
        self.absmax = block_maxima(self.projection) if self.packed else None
        self.multiplier = float(getattr(config, "logit_scale", None) or 1.0)
        self.multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return dense_rows(self.projection, start, stop, dtype, self.absmax)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, D) -> (C, V) in fp32, block by block of the vocabulary."""
        logits_CV = torch.empty(hidden_CD.shape[0], self.vocabulary, device=hidden_CD.device)
        for start in range(0, self.vocabulary, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.vocabulary)
            logits_CV[:, start:stop] = F.linear(hidden_CD, self._rows(start, stop, hidden_CD.dtype))
        bias: Any = getattr(self.projection, "bias", None)
        if bias is not None:
            logits_CV += bias
        if self.multiplier != 1.0:
            logits_CV *= self.multiplier
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def backward(self, grad_CV: Tensor, logits_CV: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Gradient at the hidden states, (C, D) in ``dtype``; ``grad_CV`` is overwritten.

        Args:
            grad_CV: gradient at the logits.
            logits_CV: the logits themselves, needed where they are capped.
        """
        if self.softcap is not None:
            assert logits_CV is not None
            grad_CV *= 1 - (logits_CV / self.softcap).square()
        if self.multiplier != 1.0:
            grad_CV *= self.multiplier
        if not self.packed:
            return grad_CV.to(dtype) @ dense_weight(self.projection, dtype)
        weight_columns = int(self.projection.in_features)  # type: ignore[arg-type]
        grad_CD = grad_CV.new_zeros(grad_CV.shape[0], weight_columns)
        for start in range(0, self.vocabulary, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.vocabulary)
            grad_CD += _product_in_fp32(grad_CV[:, start:stop].to(dtype), self._rows(start, stop, dtype))
        return grad_CD.to(dtype)


def linear_cross_entropy(hidden_TD: Tensor, head: LMHead, targets_T: Tensor) -> Tensor:
    """Cross-entropy of the head's logits, summed.

    Equivalent to, and tested against::

        F.cross_entropy(head.logits(hidden_TD), targets_T, reduction="sum")

    The head is frozen, so the gradient at the hidden states is all that the backward pass needs: it is
    made chunk by chunk in the forward pass, while a chunk's logits are there.

    Args:
        hidden_TD: hidden states that predict a trained token.
        head: see :class:`LMHead`.
        targets_T: int64 token ids.

    Returns:
        fp32 scalar.
    """
    wanted = hidden_TD.requires_grad and torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden_TD, targets_T, head, wanted)  # type: ignore[no-any-return, no-untyped-call]


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32: partial sums over blocks of the vocabulary are not rounded where the device can help it."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, head: LMHead, wanted: bool) -> Tensor:
        total = torch.zeros((), device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if wanted else None
        chunk = max(1, CHUNK_BYTES // (4 * head.vocabulary))
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = head.logits(hidden_TD[rows])
            targets_C1 = targets_T[rows, None]
            log_normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            total += (log_normaliser_C1 - logits_CV.gather(1, targets_C1)).sum()
            if grad_TD is None:
                continue
            capped = logits_CV.clone() if head.softcap is not None else None
            grad_CV = logits_CV.sub_(log_normaliser_C1).exp_()  # softmax, in the logits' place
            grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, -1.0))
            grad_TD[rows] = head.backward(grad_CV, capped, hidden_TD.dtype)
        ctx.save_for_backward(grad_TD)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grad_total.to(grad_TD.dtype), None, None, None
