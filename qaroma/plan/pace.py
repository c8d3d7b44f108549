"""How long a step with a streamed base takes, by arithmetic alone: nothing of it was measured.

Dimensions: D width of all query heads of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from qaroma.model.layers import decoder_layers

_LONGEST = 2**20  # tokens, beyond which nobody asks


@dataclass(frozen=True)
class StreamedPace:
    """The time of a step at a rate of copying and one of computing.

    The layers travel once in the forward pass and once in the backward pass, which computes them twice.
    In each the longer of copying and computing decides; the head counts in neither.

    Attributes:
        weights: of the layers' matrices, that a token meets.
        streamed: bytes of the layers in host memory.
        attention: operations a token and token of context in all layers: two products of D, half of them masked.
        pcie, tflops: GB/s and TFLOP/s.
    """

    weights: int
    streamed: int
    attention: int
    pcie: float
    tflops: float

    def copying(self) -> float:
        """Seconds that the layers travel in one pass."""
        return self.streamed / (self.pcie * 1e9)

    def computing(self, length: int, micro_batch: int = 1) -> float:
        """Seconds of the forward pass."""
        return length * micro_batch * (2 * self.weights + self.attention * length) / (self.tflops * 1e12)

    def seconds(self, length: int, micro_batch: int = 1) -> float:
        """Of a step."""
        forward = self.computing(length, micro_batch)
        # Once more forward, and the gradients of the inputs; attention's take two and a half times its forward pass.
        backward = 2 * forward + 1.5 * length**2 * micro_batch * self.attention / (self.tflops * 1e12)
        return max(forward, self.copying()) + max(backward, self.copying())

    def hidden_from(self) -> int:
        """Tokens of one sequence from which on copying hides behind the forward pass."""
        return _first(lambda length: self.computing(length) >= self.copying())


def streamed_pace(model: nn.Module, streamed: int, *, pcie: float, tflops: float) -> StreamedPace:
    """The pace of a model.

    Args:
        model: transformers model, on device ``meta`` perhaps, its weights dense.
        streamed: bytes of its layers in host memory.
        pcie, tflops: GB/s and TFLOP/s.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(_met(p, config) for layer in decoder_layers(model) for p in layer.parameters() if p.ndim >= 2)
    return StreamedPace(weights, streamed, 2 * width * config.num_hidden_layers, pcie, tflops)


def _met(parameter: nn.Parameter, config: Any) -> int:
    """Weights of a matrix that one token meets: of fused experts those that it is sent to."""
    share = 1.0
    if parameter.ndim == 3:
        share = (getattr(config, "num_experts_per_tok", None) or parameter.shape[0]) / parameter.shape[0]
    return int(parameter.numel() * share)


def _first(holds: Callable[[int], bool]) -> int:
    """The least number that something holds for, which it does for all larger ones."""
    below, at = 0, _LONGEST
    while at - below > 1:
        middle = (below + at) // 2
        if holds(middle):
            at = middle
        else:
            below = middle
    return at
