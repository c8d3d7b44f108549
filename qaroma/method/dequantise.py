"""Dense views of a frozen weight, plain or packed in 4 bits.

Dimensions: M out_features, N in_features of a weight W (M, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Sizes of a dense weight that must be free beside it, or it is not kept: a tile's activations, and the next weight.
SPARE = 3


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as (N, M), as GPT-2's ``Conv1D`` does."""
    return hasattr(module, "nf")


def is_stored_transposed(module: nn.Module) -> bool:
    """Whether a checkpoint holds a layer's weight as (N, M), though it may lie here in 4 bits, as (M, N)."""
    from transformers.pytorch_utils import Conv1D

    return is_transposed(module) or getattr(module, "source_cls", None) is Conv1D


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(M, N) of a layer by the sizes that it tells; None where it tells none."""
    told: Any = module
    if is_transposed(module):
        return told.nf, told.nx
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return None if None in sizes else sizes  # type: ignore[return-value]


def frozen_weight(module: nn.Module) -> Any:
    """The weight of a linear layer, there for what is computed with it next.

    One that is streamed from host memory (:mod:`qaroma.engine.streaming`) is asked for: until another
    layer's is, its values can be read.

    Args:
        module: ``nn.Linear`` or bitsandbytes ``Linear4bit``.
    """
    weight: Any = module.weight
    ask = getattr(weight, "ask", None)
    if ask is not None:
        ask()
    return weight


def dense_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer as a dense matrix.

    Args:
        module: ``nn.Linear``, ``Conv1D`` or bitsandbytes ``Linear4bit``.
        dtype: dtype of the result; a 4-bit weight is dequantised in the dtype it was quantised from first.

    Returns:
        Tensor of shape (M, N), without gradient; the weight itself, or a view of it, where it is plain and of
        that dtype.
    """
    weight = frozen_weight(module)
    state = getattr(weight, "quant_state", None)
    if state is None:
        plain = weight.detach().to(dtype)
        return plain.T if is_transposed(module) else plain  # type: ignore[no-any-return]
    kept: KeptDense | None = getattr(weight, "kept_dense", None)
    return _unpacked(weight, dtype) if kept is None else kept.dense(weight, dtype)


def _unpacked(weight: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)  # type: ignore[no-any-return]


class KeptDense:
    """Dense forms of 4-bit weights that are read again soon, as many as there is room for.

    Args:
        spare: bytes that could still be taken.
    """

    def __init__(self, spare: Callable[[], int]) -> None:
        self._spare: Callable[[], int] | None = spare
        self._known: dict[tuple[int, torch.dtype], Tensor] = {}

    def dense(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """(M, N), the one of before where there is one."""
        key = (id(weight), dtype)
        if key in self._known:
            return self._known[key]
        dense = _unpacked(weight, dtype)
        if self._spare is not None and self._spare() >= SPARE * dense.nbytes:
            self._known[key] = dense
        else:
            self._spare = None  # a pass has no more room later
        return dense


@contextmanager
def weights_kept_dense(module: nn.Module, spare: Callable[[], int]) -> Iterator[None]:
    """Inside, :func:`dense_weight` unpacks a 4-bit weight once, however often it is asked, where there is room.

    Args:
        module: whose layers are meant.
        spare: bytes that could still be taken.
    """
    kept = KeptDense(spare)
    packed = (weight for weight in module.parameters() if hasattr(weight, "quant_state"))
    weights: list[Any] = [weight for weight in packed if not hasattr(weight, "kept_dense")]  # by a pass around this one
    for weight in weights:
        weight.kept_dense = kept
    try:
        yield
    finally:
        for weight in weights:
            del weight.kept_dense


def fused_product(x_TN: Tensor, module: nn.Module) -> Tensor:
    """``F.linear(x, dense_weight(module), module.bias)`` without a gradient, by bitsandbytes' own kernels.

    They read a 4-bit weight as it is up to the rows that they are made for: one before bitsandbytes 0.50, some dozens
    from then on, by card and shape. For more rows bitsandbytes unpacks the weight, as :func:`dense_weight` does.

    Args:
        x_TN: in the compute dtype.
        module: ``nn.Linear``, ``Conv1D`` or bitsandbytes ``Linear4bit``.

    Returns:
        (T, M), without gradient.
    """
    weight, dtype = frozen_weight(module), x_TN.dtype
    bias: Any = None if module.bias is None else module.bias.to(dtype)
    state = getattr(weight, "quant_state", None)
    unaligned = state is not None and x_TN.shape[1] % state.blocksize  # bitsandbytes unpacks these, with a warning
    if state is None or unaligned or hasattr(weight, "kept_dense"):
        return F.linear(x_TN, dense_weight(module, dtype), bias)
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x_TN, weight.data.t(), state, bias=bias)  # type: ignore[no-any-return]


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32: on a card a sum over many rows is not rounded to 16 bits at its end, at no cost."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def block_maxima(module: nn.Module) -> Tensor:
    """The fp32 constant of each block of a 4-bit weight, dequantised where they are quantised too.

    Args:
        module: bitsandbytes ``Linear4bit``.

    Returns:
        (M * N / block size,) in fp32.
    """
    from bitsandbytes.functional import dequantize_blockwise

    state = frozen_weight(module).quant_state
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


def dense_rows(module: nn.Module, start: int, stop: int, dtype: torch.dtype, maxima: Tensor | None = None) -> Tensor:
    """Rows ``start`` .. ``stop`` of :func:`dense_weight`, without making the others dense.

    Equivalent to ``dense_weight(module, dtype)[start:stop]``. A 4-bit weight is packed block after
    block along its rows, so rows that begin at a block's border are a contiguous part of it.

    Args:
        module: see :func:`dense_weight`.
        start, stop: rows, with ``start * N`` a multiple of the block size of a 4-bit weight.
        dtype: dtype of the result.
        maxima: :func:`block_maxima` of a 4-bit weight, for who asks for many parts of one.

    Returns:
        Tensor of shape (stop - start, N).
    """
    weight = frozen_weight(module)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return dense_weight(module, weight.dtype)[start:stop].to(dtype)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    columns = state.shape[1]
    first, last = start * columns, stop * columns
    if first % state.blocksize:
        raise ValueError(f"row {start} of {columns} columns does not begin a block of {state.blocksize} values")
    maxima = block_maxima(module) if maxima is None else maxima
    part = QuantState(
        absmax=maxima[first // state.blocksize : -(-last // state.blocksize)].contiguous(),
        shape=torch.Size((stop - start, columns)),
        dtype=state.dtype,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
    )
    packed = weight.data.reshape(-1)[first // 2 : last // 2].reshape(-1, 1)
    return dequantize_4bit(packed, part).to(dtype)  # type: ignore[no-any-return]
