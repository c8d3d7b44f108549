"""The one adapted projection: a frozen (4-bit or dense) weight plus low-rank factors.

Dimensions: T tokens, N in_features, M out_features, R rank (capacity), K rank that trains.
Both factors are stored rank-major, A_RN and B_RM, so that a component is a block of contiguous rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.method.dequantise import dense_weight, fused_product, product_in_fp32
from qaroma.method.kept_input import KeptInput, keep_input


class Active(NamedTuple):
    """The components that train, as the projection needs to see them.

    ``A`` (K, N) and ``B`` (K, M) are the fp32 parameters that receive the gradient, K the rank of all
    these components together; their rounded copies stand in rows ``start`` .. ``start + K`` of the
    compute factors, B's times ``scale``.
    """

    A: nn.Parameter
    B: nn.Parameter
    start: int
    scale: float

    def columns(self, product_TR: Tensor) -> Tensor:
        """(T, K) of a product with all R rows of a factor: those with the rows that train, a view."""
        return product_TR[:, self.start : self.start + self.A.shape[0]]


def lowrank_linear(x: Tensor, base: nn.Module | None, A_RN: Tensor, B_RM: Tensor, active: Active | None) -> Tensor:
    """``x W0^T + bias + (x A^T) B``, with gradients for the input and the active rows only.

    Equivalent to, and tested against::

        y = F.linear(x, dense_weight(base), base.bias) + (x @ A_RN.T) @ B_RM

    with ``A_RN`` and ``B_RM`` requiring grad, where ``active.A.grad`` is the active rows of dA and
    ``active.B.grad`` is ``scale`` times those of dB. Only the input and its products with the rows of A that train are
    saved, and only where a component trains; the base weight is dequantised again in the backward pass, so no dense
    weight outlives a call.

    Args:
        x: (..., N) in the compute dtype.
        base: linear layer that is never trained; None leaves its term out.
        A_RN: (R, N) compute factor.
        B_RM: (R, M) compute factor, the scale folded in.
        active: where the gradient of the components that train goes; None trains nothing.

    Returns:
        (..., M) in the compute dtype.
    """
    A_param, B_param = (active.A, active.B) if active is not None else (None, None)
    x_TN, kept = x.reshape(-1, x.shape[-1]), None
    x_TR = x_TN.detach() @ A_RN.T
    if not torch.is_grad_enabled() and x.is_cuda and base is not None:
        return _with_factors(fused_product(x_TN, base), x_TR, B_RM).view(*x.shape[:-1], -1)
    if active is not None and x.requires_grad and torch.is_grad_enabled():
        x_TN, kept = keep_input(x_TN, active.columns(x_TR))
    y_TM = _LowRankLinear.apply(x_TN, x_TR, A_param, B_param, base, A_RN, B_RM, active, kept)  # type: ignore[no-untyped-call]
    # The view is made out here: autograd refuses one that a function returns to whoever adds to it in place (Falcon).
    return y_TM.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def _with_factors(y_TM: Tensor, x_TR: Tensor, B_RM: Tensor) -> Tensor:
    """``y += (x A^T) B``, in place: no second tensor of y's size."""
    return y_TM.addmm_(x_TR, B_RM) if B_RM.shape[0] else y_TM


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TN: Tensor,
        x_TR: Tensor,
        A_param: Tensor | None,
        B_param: Tensor | None,
        base: nn.Module | None,
        A_RN: Tensor,
        B_RM: Tensor,
        active: Active | None,
        kept: KeptInput | None,
    ) -> Tensor:
        if active is not None and kept is None:
            ctx.save_for_backward(x_TN, active.columns(x_TR))
        ctx.base, ctx.A_RN, ctx.B_RM, ctx.active, ctx.kept = base, A_RN, B_RM, active, kept
        if base is None:
            y_TM = x_TN.new_zeros(x_TN.shape[0], B_RM.shape[1])
        else:
            bias: Any = base.bias
            y_TM = F.linear(x_TN, dense_weight(base, x_TN.dtype), None if bias is None else bias.to(x_TN.dtype))
        return _with_factors(y_TM, x_TR, B_RM)

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        grad_TN = grad_A = grad_B = None
        # Gradient at the output of A, shared by both gradients below.
        grad_TR = grad_TM @ ctx.B_RM.T
        if ctx.needs_input_grad[0]:
            if ctx.base is None:
                grad_TN = grad_TR @ ctx.A_RN
            else:
                grad_TN = (grad_TM @ dense_weight(ctx.base, grad_TM.dtype)).addmm_(grad_TR, ctx.A_RN)
        if ctx.active is not None:
            x_TN, x_TK = ctx.saved_tensors if ctx.kept is None else ctx.kept.tensors
            grad_A = product_in_fp32(ctx.active.columns(grad_TR).T, x_TN)
            grad_B = product_in_fp32(x_TK.T, grad_TM).mul_(ctx.active.scale)
        return grad_TN, None, grad_A, grad_B, None, None, None, None, None
