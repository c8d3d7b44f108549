"""llama.cpp's K types of 4, 5 and 6 bits: what gguf-py reads and does not write, to the byte layout of ggml.

A super-block holds 256 weights. q4_K and q5_K cut it into 8 blocks of 32 and hold a weight as
``d * scale * code - dmin * minimum``; q6_K cuts it into 16 blocks of 16 and holds ``d * scale * code``. d and dmin are
fp16, scales and minima 6 bits (q6_K: 8), codes 4, 5 or 6. What is chosen is chosen as llama-quantize does it without an
importance matrix: a block's scale is searched around the one that spans its values, for the least squared error, each
weight counted by its size.

Dimensions: S super-blocks, G blocks in each, W weights in each block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_SUPER = 256
_AT_ONCE = 512  # super-blocks for each thread: what is searched stays in the processor's cache
_NOTHING = 1e-15  # a largest value below which a block is zero


def quantise(values: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Quantise rows to q4_K, q5_K or q6_K.

    Args:
        values: (..., N) in fp32, N a multiple of 256.
        bits: 4, 5 or 6.

    Returns:
        (..., bytes of a row), uint8.
    """
    pack = _six_bits if bits == 6 else _four_bits if bits == 4 else _five_bits
    parts = torch.split(values.reshape(-1, _SUPER), _AT_ONCE * torch.get_num_threads())
    packed: np.ndarray[Any, Any] = torch.cat([pack(part) for part in parts]).numpy()
    return packed.reshape(*values.shape[:-1], -1)


def _four_bits(values: Tensor) -> Tensor:
    """(S, 256) as (S, 144): d, dmin, scales and minima, codes."""
    head, codes_SGW = _with_minima(values.view(-1, 8, 32), levels=15, first=-1.0, steps=21)
    return torch.cat([head, _nibbles(codes_SGW)], 1)


def _five_bits(values: Tensor) -> Tensor:
    """(S, 256) as (S, 176): d, dmin, scales and minima, the codes' highest bits, their lower four."""
    head, codes_SGW = _with_minima(values.view(-1, 8, 32), levels=31, first=-0.5, steps=16)
    highest = ((codes_SGW >> 4) << torch.arange(8, dtype=torch.uint8)[:, None]).sum(1, dtype=torch.uint8)
    return torch.cat([head, highest, _nibbles(codes_SGW & 15)], 1)


def _six_bits(values: Tensor) -> Tensor:
    """(S, 256) as (S, 210): the codes' lower four bits, their upper two, scales, d."""
    x_SGW = values.view(-1, 16, 16)
    scale_SG = _scale(x_SGW)
    largest = scale_SG.gather(1, scale_SG.abs().argmax(1, keepdim=True))
    factor = torch.where(largest.abs() < _NOTHING, 0.0, -128 / largest)
    d = torch.where(factor == 0, 0.0, 1 / factor).half()
    held_SG = (factor * scale_SG).round().clamp(max=127)
    codes = _codes(x_SGW, d.float() * held_SG, -32, 31).add(32).to(torch.uint8).view(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    lower = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2).flatten(1)
    upper = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1)
    return torch.cat([lower, upper, held_SG.to(torch.int8).view(torch.uint8), d.view(torch.uint8)], 1)


def _with_minima(x_SGW: Tensor, *, levels: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """The head of a super-block with minima, (S, 16) bytes, and its codes, (S, G, W)."""
    scale_SG, minimum_SG = _scale_and_minimum(x_SGW, levels=levels, first=first, steps=steps)
    d, held_SG = _six_bit_scales(scale_SG)
    dmin, held_minimum_SG = _six_bit_scales(minimum_SG)
    shifted = x_SGW + (dmin.float() * held_minimum_SG).unsqueeze(2)
    codes = _codes(shifted, d.float() * held_SG, 0, levels).to(torch.uint8)
    s, m = held_SG.to(torch.uint8), held_minimum_SG.to(torch.uint8)
    # The first four of each as they are, with the upper bits of the last four above them; then the lower bits of those.
    both = [one[:, :4] | (one[:, 4:] >> 4) << 6 for one in (s, m)] + [s[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    return torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), *both], 1), codes


def _six_bit_scales(values_SG: Tensor) -> tuple[Tensor, Tensor]:
    """d in fp16, (S, 1), and whole numbers up to 63 that it is multiplied by."""
    largest = values_SG.amax(1, keepdim=True)
    factor = torch.where(largest > 0, 63 / largest, 0.0)
    return (largest / 63).half(), (factor * values_SG).round().clamp(max=63)


def _codes(x_SGW: Tensor, scale_SG: Tensor, low: int, high: int) -> Tensor:
    scale = scale_SG.unsqueeze(2)
    return torch.where(scale == 0, 0.0, x_SGW / scale).round().clamp(low, high)


def _nibbles(codes_SGW: Tensor) -> Tensor:
    """Each two neighbouring blocks in the halves of one block's bytes."""
    return (codes_SGW[:, 0::2] | codes_SGW[:, 1::2] << 4).flatten(1)


def _scale_and_minimum(x_SGW: Tensor, *, levels: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """Scale s and minimum m of each block, so that s q - m is near x for codes q from 0 to ``levels``.

    Every step spans what lies between the best -m so far and the largest value with some tenths of a code more or
    fewer, and solves for the s and m that are best for the codes that this gives, in weighted least squares; m is never
    negative.

    Args:
        x_SGW: the weights.
        levels: the largest code.
        first: how many codes more than ``levels`` the first step has; each next one has a tenth more.
        steps: how many.

    Returns:
        Two of (S, G).
    """
    weight = x_SGW.abs() + x_SGW.square().mean(2, keepdim=True).sqrt()
    weighted_x = weight * x_SGW
    sum_w, sum_x = weight.sum(2), weighted_x.sum(2)
    high, low = x_SGW.amax(2), x_SGW.amin(2).clamp(max=0)

    def codes_of(more: float) -> Tensor:
        factor = (levels + more) / (high - low)
        return (x_SGW - low.unsqueeze(2)).mul_(factor.unsqueeze(2)).round_().clamp_(0, levels)

    def error_of(codes: Tensor, scale: Tensor, lowest: Tensor) -> Tensor:
        off = (codes * scale.unsqueeze(2)).add_(lowest.unsqueeze(2)).sub_(x_SGW)
        return off.square_().mul_(weight).sum(2)

    best_scale = (high - low) / levels
    best = error_of(codes_of(0), best_scale, low)
    for step in range(steps):
        codes = codes_of(first + 0.1 * step)
        weighted = weight * codes
        sum_q, sum_qq, sum_xq = weighted.sum(2), weighted.mul_(codes).sum(2), (weighted_x * codes).sum(2)
        determinant = sum_w * sum_qq - sum_q.square()
        lowest = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        scale = torch.where(lowest > 0, sum_xq / sum_qq, (sum_w * sum_xq - sum_x * sum_q) / determinant)
        lowest = lowest.clamp(max=0)
        error = error_of(codes, scale, lowest)
        better = (determinant > 0) & (error < best)
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        low = torch.where(better, lowest, low)
    return best_scale, -low


def _scale(x_SGW: Tensor) -> Tensor:
    """The scale s of each block, so that s q is near x for codes q from -32 to 31, weighted by x squared.

    Returns:
        (S, G), of either sign: the largest value has the code -32, of which there is one more than of positive ones.
    """
    largest = x_SGW.gather(2, x_SGW.abs().argmax(2, keepdim=True))
    weight = x_SGW.square()
    weighted_x = weight * x_SGW
    scale = best = torch.zeros_like(x_SGW[..., 0])
    for step in (0, *range(-9, 0), *range(1, 10)):
        codes = (x_SGW * (-(32 + 0.1 * step) / largest)).round_().clamp_(-32, 31)
        sum_xq, sum_qq = (weighted_x * codes).sum(2), (weight * codes.square()).sum(2)
        better = (sum_qq > 0) & (sum_xq.square() > best * sum_qq)
        scale = torch.where(better, sum_xq / sum_qq, scale)
        best = torch.where(better, sum_xq * scale, best)
    return torch.where(largest.squeeze(2).abs() < _NOTHING, 0.0, scale)
