"""Tensors with a shape, a dtype and a storage, but no memory behind it: torch's ``meta`` device, posing as one
that training runs on.

``FakeTensorMode`` would do the same on device ``cpu`` at ten times the time an operation, which decides
whether a step of a hundred thousand tokens can be traced at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def weightless() -> Iterator[None]:
    """Inside, tensors are made on ``meta``, and code that was written for a real device runs on them.

    Backward passes have to end inside, too. For as long, attention on ``meta`` is fused in every thread.
    """
    with _fused_attention(), torch.device("meta"), _AsOnADevice():
        yield


class _AsOnADevice(TorchFunctionMode):
    """What ``meta`` does otherwise than a device.

    Nothing can be copied from it to the CPU; its random numbers take no generator; no value can be
    asked for: a condition on values, such as transformers' whether nothing is packed, is taken to hold.
    And a tensor made there from numbers is made unseen: here it is copied to it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is torch.tensor:
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        if func is Tensor.uniform_:
            kwargs.pop("generator", None)
        elif func is Tensor.to and args[0].is_meta:
            args = tuple("meta" if _is_cpu(value) else value for value in args)
            kwargs = {name: "meta" if _is_cpu(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_cpu(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cpu"


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let SDPA on ``meta`` be the operation that it is on a CPU, not a matrix of scores that no GPU makes.

    The tensors of that operation are FlashAttention's: it keeps its output and the logarithm of each
    row's normaliser, and takes fewer key heads than query heads as they are. Done in the dispatcher,
    since a backward pass that recomputes a layer does so outside of any mode; undone at the end.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output  # type: ignore[no-any-return]
