"""Tensors with a shape, a dtype and a storage, but no memory behind it: torch's ``meta`` device, posing as one
that training runs on.

``FakeTensorMode`` would do the same on device ``cpu`` at ten times the time an operation, which decides
whether a step of a hundred thousand tokens can be traced at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qaroma.plan.work import Kernel, kernel_of

_META = torch.device("meta")


@contextmanager
def weightless() -> Iterator[None]:
    """Inside, tensors are made on ``meta``, and code that was written for a real device runs on them.

    Backward passes have to end inside, too. For as long, attention and norms on ``meta`` are fused in every thread.
    """
    with _fused_kernels(), torch.device("meta"), _AsOnADevice():
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


class KnownShapes:
    """Runs operations on weightless tensors, each only once for the same shapes.

    As ``func(*args, **kwargs)``, several times faster: what an operation returns follows from shapes alone, and
    torch works that out in Python for each of the thousands that layers and steps repeat. Views are left to torch.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[[Any, Any], Any], Kernel | None]] = {}
        self._views: set[Any] = set()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Kernel | None]:
        """What an operation returns, and the kernel that it is to a card.

        Modes for torch's functions have done with it, and would be asked once more by what is called here.
        """
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Kernel | None]:
        if func in self._views:
            return func(*args, **kwargs), None
        key = (func, _shapes(args), _shapes(tuple(kwargs.items())) if kwargs else None)
        known = self._known.get(key)
        if known is None:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            before = {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in inputs}
            result = func(*args, **kwargs)
            again = _again(result, args, kwargs, before)
            if again is None:
                self._views.add(func)
                return result, None
            known = self._known[key] = again, kernel_of(func, args, kwargs, result)
            return result, known[1]
        return known[0](args, kwargs), known[1]


def _again(
    result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: dict[int, int]
) -> Callable[[Any, Any], Any] | None:
    """What gives an operation's result for other inputs of the same shapes; None where it views one of them."""
    made = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
    if not made or not all(isinstance(one, Tensor) and one.is_meta for one in made):
        return None
    if isinstance(result, Tensor) and before.get(id(result.untyped_storage())) == result.untyped_storage().nbytes():
        if result is args[0]:
            return lambda args, _: args[0]
        if result is kwargs.get("out"):
            return lambda _, kwargs: kwargs["out"]
    if any(id(one.untyped_storage()) in before for one in made):
        return None
    makers, kind = [_maker(one) for one in made], list if isinstance(result, list) else tuple
    return (lambda *_: makers[0]()) if isinstance(result, Tensor) else lambda *_: kind(make() for make in makers)


def _shapes(value: Any) -> Any:
    """What decides an operation's result, to look it up by."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return type(value), value


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    size, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
    return lambda: torch.empty_strided(size, stride, dtype=dtype, device=_META)


def _is_cpu(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cpu"


@contextmanager
def _fused_kernels() -> Iterator[None]:
    """Let SDPA on ``meta`` be the operation that it is on a CPU, not a matrix of scores that no GPU makes, and torch's
    RMSNorm one kernel a pass, as on a GPU.

    The tensors of that attention are FlashAttention's: it keeps its output and the logarithm of each
    row's normaliser, and takes fewer key heads than query heads as they are. Done in the dispatcher,
    since a backward pass that recomputes a layer does so outside of any mode; undone at the end.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")  # type: ignore[no-untyped-call]
    library.impl("_fused_rms_norm", _norm, "AutogradMeta")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # what torch makes of it, which each layer keeps
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), -torch.inf))
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output  # type: ignore[no-any-return]


def _norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor]:
    return OneKernelNorm.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class OneKernelNorm(torch.autograd.Function):
    """What torch's kernels read, write and keep: a number a row beside the input; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        per_row = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, per_row)
        ctx.mark_non_differentiable(per_row)
        return torch.mul(x, weight), per_row

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.addcmul(grad, x, weight), None
