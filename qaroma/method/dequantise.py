"""Dense views of a frozen weight, plain or packed in 4 bits.

Dimensions: M out_features, N in_features of a weight W (M, N).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        module: ``nn.Linear`` or bitsandbytes ``Linear4bit``.
        dtype: dtype of the result; a 4-bit weight is dequantised in the dtype it was quantised from first.

    Returns:
        Tensor of shape (M, N), without gradient; the weight itself where it is plain and of that dtype.
    """
    weight = frozen_weight(module)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().to(dtype)  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)  # type: ignore[no-any-return]


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
        return weight.detach()[start:stop].to(dtype)  # type: ignore[no-any-return]
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
