"""The work of a step: its kernels, and how long a card takes for them by arithmetic alone (a roofline).

Dimensions: B rows, H query heads, L tokens, D width of a head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from qaroma.plan.card import Card

PRODUCTS = 0.75  # of a card's peak, that large matrix products reach
BANDWIDTH = 0.85  # of its memory's
COPIES = 0.8  # of the bus's, from pinned memory
LAUNCH = 5e-6  # seconds from one kernel's start to the next, whatever it does

_aten = torch.ops.aten
_NO_KERNEL = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided}
_CHOSEN_ROWS = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select}  # of a table that is not read whole
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel does: operations of products, bytes that it reads and writes, and whether its products are in
    fp32."""

    flops: int
    bytes: int
    fp32: bool

    def seconds(self, card: Card) -> float:
        """The longer of computing and moving."""
        peak = card.fp32_tflops if self.fp32 else card.tflops
        return max(self.flops / (PRODUCTS * peak * 1e12), self.bytes / (BANDWIDTH * card.bandwidth * 1e9))


@dataclass
class Work:
    """The work of one phase of a step.

    Attributes:
        kernels: how many of each.
        to_host, to_card: bytes over the bus, both ways at a time.
    """

    kernels: Counter[Kernel] = field(default_factory=Counter)
    to_host: int = 0
    to_card: int = 0

    def copying(self, card: Card) -> float:
        """Seconds on the bus."""
        return max(self.to_host, self.to_card) / (COPIES * card.pcie * 1e9)

    def computing(self, card: Card) -> float:
        """Seconds of the kernels: the longer of what they take and of launching them. What goes over the bus takes the
        card's memory once."""
        busy = sum(count * kernel.seconds(card) for kernel, count in self.kernels.items())
        busy += (self.to_host + self.to_card) / (BANDWIDTH * card.bandwidth * 1e9)
        return max(busy, self.kernels.total() * LAUNCH)

    def seconds(self, card: Card) -> float:
        """The longer of computing and copying, which goes on beside it."""
        return max(self.computing(card), self.copying(card))

    @classmethod
    def along(cls, works: Sequence[Work], line: Callable[[Sequence[int]], int]) -> Work:
        """The work on a line through those of shallow models.

        A kernel whose size depends on the depth, as the optimiser's, has a negative count in one of its sizes: the
        sums are on the line.
        """
        names = {name: None for work in works for name in work.kernels}
        kernels = Counter({name: line([work.kernels[name] for work in works]) for name in names})
        return cls(kernels, line([work.to_host for work in works]), line([work.to_card for work in works]))


def kernel_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Kernel | None:
    """What an operation is to a card; None where it starts no kernel.

    Args:
        func: the operation, which is no view, as a ``TorchDispatchMode`` is given it.
        args, kwargs: its arguments.
        result: of it.
    """
    packet = func.overloadpacket
    if packet in _NO_KERNEL:
        return None
    made = _bytes(result)
    read = args, {name: value for name, value in kwargs.items() if name != "out"}
    taken = made if packet in _CHOSEN_ROWS else _bytes(read)
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    flops = _flops(packet, args, kwargs, result)
    return Kernel(flops, taken + made, bool(flops) and tensors[0].dtype == torch.float32)


def _bytes(values: Any) -> int:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if packet is _ATTENTION:
        return _attention_flops(args[0], args[1], causal=len(args) > 4 and args[4])
    if packet is _ATTENTION_BACKWARD:
        return 5 * _attention_flops(args[1], args[2], causal=args[7]) // 2
    count = flop_registry.get(_IN_PLACE.get(packet, packet))
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _attention_flops(query_BHLD: Tensor, key: Tensor, *, causal: bool) -> int:
    """Two products, of which a causal one leaves out the half."""
    return 4 * query_BHLD.numel() * key.shape[2] // (2 if causal else 1)


def step_seconds(work: dict[str, Work], card: Card) -> float:
    """Of all phases of a step on a card."""
    return math.fsum(phase.seconds(card) for phase in work.values())
