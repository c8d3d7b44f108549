"""Linear cross-entropy in chunks: nothing of size tokens x vocabulary ever lives.

Dimensions: T trained tokens, C tokens of a chunk, S of a slice of it, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.method.dequantise import block_maxima, dense_rows, dense_weight, product_in_fp32
from qaroma.method.pieces import Pieces, every_piece

CHUNK_BYTES = 256 * 2**20  # that a chunk of tokens may take, however few there are
FEW_CHUNKS = 4  # that are no matter: a chunk takes no more than the head itself where these are enough
HIDDEN_SHARE = 6  # times the hidden states' own bytes is what it may take where they are many
SLICES = 8  # of a chunk: what is element-wise on logits makes copies of one slice at a time
# A token's gradient times this is what lies in fp16, whose numbers end at 6e-8: a token that is all but learnt would
# lose its own before any scale of the loss reached it.
FP16_SHIFT = 1024.0
BLOCK_ROWS = 4096  # rows of the head that are dense at a time: a multiple of any quantisation block


class LMHead:
    """The output head of a causal model with what its config does to the logits.

    ``model.forward`` may scale logits (Granite, Cohere) or cap them softly (Gemma 2); calling a
    model to its hidden states only must not lose that. The head is frozen; it may lie in 4 bits.

    Args:
        model: a causal language model of transformers.
        pieces: which chunks, slices and blocks are computed.
    """

    def __init__(self, model: Any, pieces: Pieces = every_piece) -> None:
        self.pieces = pieces
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.projection: nn.Module = model.get_output_embeddings()
        self.vocabulary: int = self.projection.out_features
        self.packed = getattr(self.projection.weight, "quant_state", None) is not None
        self.absmax = block_maxima(self.projection) if self.packed else None
        self.multiplier = float(getattr(config, "logit_scale", None) or 1.0)
        self.multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def _rows(self, block: slice, dtype: torch.dtype) -> Tensor:
        return dense_rows(self.projection, block.start, block.stop, dtype, self.absmax)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, D) -> (C, V) in fp32, block by block of the vocabulary."""
        logits_CV = torch.empty(hidden_CD.shape[0], self.vocabulary, device=hidden_CD.device)
        for block in self.pieces(self.vocabulary, BLOCK_ROWS):
            logits_CV[:, block] = F.linear(hidden_CD, self._rows(block, hidden_CD.dtype))
        bias: Any = getattr(self.projection, "bias", None)
        if bias is not None:
            logits_CV += bias
        if self.multiplier != 1.0:
            logits_CV *= self.multiplier
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def chunk(self, hidden_TD: Tensor) -> int:
        """Tokens of a chunk: the more, the less often a packed head is dequantised.

        The decoder's backward pass, which follows, holds eight times the hidden states and more besides,
        so that chunks which grow with them do not raise the peak of a step.
        """
        tokens, columns = hidden_TD.shape
        fp32_copies = 1 + 1 / SLICES
        copies = 0 if self.packed else hidden_TD.element_size()  # of the gradient, for the product with a dense head
        a_token = self.vocabulary * (4 * fp32_copies + copies)
        head = self.vocabulary * columns * hidden_TD.element_size()
        least = min(CHUNK_BYTES, max(head, math.ceil(tokens / FEW_CHUNKS) * a_token))
        return max(1, int(max(least, HIDDEN_SHARE * hidden_TD.nbytes) / a_token))

    def softmax_minus_one_hot(self, logits_SV: Tensor, log_softmax_SV: Tensor, targets_S1: Tensor) -> None:
        """Turn logits into the loss's gradient at the projection's output, in their place; uses up their softmax."""
        gradient_SV = logits_SV if self.softcap is None else log_softmax_SV
        torch.exp(log_softmax_SV, out=gradient_SV)
        gradient_SV.scatter_add_(1, targets_S1, gradient_SV.new_full(targets_S1.shape, -1.0))
        if self.softcap is not None:  # times the derivative of the cap
            logits_SV.div_(self.softcap).square_().neg_().add_(1.0).mul_(gradient_SV)
        if self.multiplier != 1.0:
            logits_SV *= self.multiplier

    def backward(self, grad_CV: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient at the hidden states, (C, D) in ``dtype``, from that at the projection's output."""
        if not self.packed:
            return grad_CV.to(dtype) @ dense_weight(self.projection, dtype)
        weight_columns = int(self.projection.in_features)  # type: ignore[arg-type]
        grad_CD = grad_CV.new_zeros(grad_CV.shape[0], weight_columns)
        for block in self.pieces(self.vocabulary, BLOCK_ROWS):
            grad_CD += product_in_fp32(grad_CV[:, block].to(dtype), self._rows(block, dtype))
        return grad_CD.to(dtype)


def linear_cross_entropy(hidden_TD: Tensor, head: LMHead, targets_T: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Cross-entropy of the head's logits, each token's times its weight, summed.

    Equivalent to, and tested against::

        (weights_T * F.cross_entropy(head.logits(hidden_TD), targets_T, reduction="none")).sum()

    Args:
        hidden_TD: hidden states that predict a trained token.
        head: see :class:`LMHead`.
        targets_T: int64 token ids.
        weights_T: fp32 factors; None is 1 for each.

    Returns:
        fp32 scalar.
    """
    losses_T = token_losses(hidden_TD, head, targets_T)
    return (losses_T if weights_T is None else losses_T * weights_T).sum()


def token_losses(hidden_TD: Tensor, head: LMHead, targets_T: Tensor) -> Tensor:
    """The cross-entropy of each token: its negative log-probability.

    Equivalent to, and tested against::

        F.cross_entropy(head.logits(hidden_TD), targets_T, reduction="none")

    The head is frozen, so the gradient at the hidden states is all that the backward pass needs: it is
    made chunk by chunk in the forward pass, while a chunk's logits are there.

    Args:
        hidden_TD, head, targets_T: see :func:`linear_cross_entropy`.

    Returns:
        (T,) fp32.
    """
    wanted = hidden_TD.requires_grad and torch.is_grad_enabled()
    return _TokenLosses.apply(hidden_TD, targets_T, head, wanted)  # type: ignore[no-any-return, no-untyped-call]


def _fill_chunk(losses_C: Tensor, grad_CD: Tensor | None, hidden_CD: Tensor, targets_C1: Tensor, head: LMHead) -> None:
    """Write the losses of a chunk's tokens, and their gradients where these are wanted; the logits die here.

    In fp16 these are :data:`FP16_SHIFT` times the gradients.
    """
    logits_CV = head.logits(hidden_CD)
    tokens = targets_C1.shape[0]
    size = math.ceil(tokens / SLICES)
    room_SV = torch.empty_like(logits_CV[:size])
    for part in head.pieces(tokens, size):
        logits_SV, targets_S1 = logits_CV[part], targets_C1[part]
        log_softmax_SV = torch.log_softmax(logits_SV, dim=1, out=room_SV[: logits_SV.shape[0]])
        torch.neg(log_softmax_SV.gather(1, targets_S1)[:, 0], out=losses_C[part])
        if grad_CD is not None:
            head.softmax_minus_one_hot(logits_SV, log_softmax_SV, targets_S1)
    if grad_CD is not None:
        if grad_CD.dtype == torch.float16:
            logits_CV *= FP16_SHIFT
        grad_CD.copy_(head.backward(logits_CV, hidden_CD.dtype))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, head: LMHead, wanted: bool) -> Tensor:
        losses_T = torch.empty(targets_T.shape, device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if wanted else None
        for rows in head.pieces(hidden_TD.shape[0], head.chunk(hidden_TD)):
            grad_CD = None if grad_TD is None else grad_TD[rows]
            _fill_chunk(losses_T[rows], grad_CD, hidden_TD[rows], targets_T[rows, None], head)
        ctx.save_for_backward(grad_TD)
        return losses_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_TD,) = ctx.saved_tensors
        if grad_TD.dtype != torch.float16:
            return grad_TD * grad_T[:, None].to(grad_TD.dtype), None, None, None
        # The factor in fp32: after the shift it may be below what fp16 holds, and the product is not.
        factor_T1 = grad_T[:, None] / FP16_SHIFT
        return torch.mul(grad_TD, factor_T1, out=torch.empty_like(grad_TD)), None, None, None
