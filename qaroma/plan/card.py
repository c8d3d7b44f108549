"""The card that is planned for: its memory and what of it is kept free, and the rates of those that people have."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from qaroma.config.levels import FRAGMENTS
from qaroma.errors import QaromaError

CONTEXT = int(0.4 * 2**30)  # of a card's memory: what CUDA takes in a process before its first tensor
RESERVE = CONTEXT + FRAGMENTS  # of a whole card

_UNITS = {"": 2**30, "g": 2**30, "m": 2**20, "t": 2**40}
_PCIE3_X16, _PCIE4_X8, _PCIE4_X16, _PCIE5_X8, _PCIE5_X16 = 15.75, 15.75, 31.5, 31.5, 63.0  # GB/s in one direction


@dataclass(frozen=True)
class Card:
    """What a card can do at best, as its maker says.

    Attributes:
        title: as people call it.
        gib: memory that CUDA shows, in whole GiB.
        tflops: TFLOP/s of dense products of 16-bit values that are summed in fp32.
        fp32_tflops: of products in fp32, outside the tensor cores.
        bandwidth: GB/s of its memory.
        pcie: GB/s over its bus in one direction.
        source: where these are said.
        reported: its name in CUDA, where it is not "NVIDIA " and the title.
    """

    title: str
    gib: int
    tflops: float
    fp32_tflops: float
    bandwidth: float
    pcie: float
    source: str
    reported: str = ""


def _geforce(title: str, gib: int, cores: int, gigahertz: float, bandwidth: float, pcie: float) -> Card:
    """A GeForce RTX 30, 40 or 50, by NVIDIA's page of it: cores, boost clock, memory.

    Each core does two operations a cycle in fp32, and its share of a tensor core four: the whitepapers of GA102, Ada
    and Blackwell give an RTX 3080 59.5 TFLOP/s, a 4090 165.2 and a 5090 209.5.
    """
    fp32 = 2 * cores * gigahertz / 1000
    source = "geforce.com: cores, boost clock, memory; four operations a core and cycle by the whitepaper"
    return Card(f"RTX {title}", gib, 2 * fp32, fp32, bandwidth, pcie, source, f"NVIDIA GeForce RTX {title}")


_CARDS = (
    Card("T4", 15, 65, 8.1, 320, _PCIE3_X16, "NVIDIA T4 datasheet", "Tesla T4"),
    Card("RTX 2060", 6, 25.8, 6.5, 336, _PCIE3_X16, "Turing whitepaper, appendix", "NVIDIA GeForce RTX 2060"),
    Card("RTX 2080 Ti", 11, 53.8, 13.4, 616, _PCIE3_X16, "Turing whitepaper", "NVIDIA GeForce RTX 2080 Ti"),
    _geforce("3060", 12, 3584, 1.777, 360, _PCIE4_X16),
    _geforce("3060 Ti", 8, 4864, 1.665, 448, _PCIE4_X16),
    _geforce("3070", 8, 5888, 1.725, 448, _PCIE4_X16),
    _geforce("3080", 10, 8704, 1.71, 760, _PCIE4_X16),
    _geforce("3090", 24, 10496, 1.695, 936, _PCIE4_X16),
    _geforce("4060", 8, 3072, 2.46, 272, _PCIE4_X8),
    _geforce("4060 Ti", 16, 4352, 2.535, 288, _PCIE4_X8),
    _geforce("4070", 12, 5888, 2.475, 504, _PCIE4_X16),
    _geforce("4070 Ti SUPER", 16, 8448, 2.61, 672, _PCIE4_X16),
    _geforce("4080", 16, 9728, 2.505, 716.8, _PCIE4_X16),
    _geforce("4090", 24, 16384, 2.52, 1008, _PCIE4_X16),
    _geforce("5060 Ti", 16, 4608, 2.57, 448, _PCIE5_X8),
    _geforce("5070", 12, 6144, 2.512, 672, _PCIE5_X16),
    _geforce("5070 Ti", 16, 8960, 2.452, 896, _PCIE5_X16),
    _geforce("5080", 16, 10752, 2.617, 960, _PCIE5_X16),
    _geforce("5090", 32, 21760, 2.407, 1792, _PCIE5_X16),
    Card("L4", 22, 121, 30.3, 300, _PCIE4_X16, "NVIDIA L4 datasheet, halved where it counts sparsity"),
    Card("A10", 22, 125, 31.2, 600, _PCIE4_X16, "NVIDIA A10 datasheet"),
    Card("L40S", 44, 362, 91.6, 864, _PCIE4_X16, "NVIDIA L40S datasheet"),
    Card("A100 40GB", 40, 312, 19.5, 1555, _PCIE4_X16, "NVIDIA A100 datasheet", "NVIDIA A100-SXM4-40GB"),
    Card("A100 80GB", 80, 312, 19.5, 2039, _PCIE4_X16, "NVIDIA A100 datasheet", "NVIDIA A100-SXM4-80GB"),
    Card("H100", 79, 989, 67, 3350, _PCIE5_X16, "NVIDIA H100 datasheet, SXM, halved where it counts sparsity",
         "NVIDIA H100 80GB HBM3"),
)  # fmt: skip
CARDS = {re.sub(r"\W", "", card.title).lower(): card for card in _CARDS}


def parse_card(text: str) -> Card:
    """A card by its name, as ``rtx3060``, ``RTX 3060`` or ``NVIDIA GeForce RTX 3060``.

    Raises:
        QaromaError: none of :data:`CARDS`; those near it are said.
    """
    asked = re.sub(r"nvidia|geforce|tesla|\W", "", text.lower())
    for name in (asked, f"rtx{asked}"):
        if name in CARDS:
            return CARDS[name]
    near = difflib.get_close_matches(asked, CARDS, n=3, cutoff=0.6)
    raise QaromaError(
        f"got card '{text}'; expected {'one such as' if near else 'one of'} {', '.join(near or CARDS)}. "
        f"Type: --card {near[0] if near else 'rtx3060'}, or --vram 12GiB for its memory alone"
    )


def parse_memory(text: str) -> int:
    """The bytes of a card as one would say it: ``8GiB``, ``8GB``, ``8`` or ``8192MiB``.

    GB counts as GiB: the 8 GB of a card's name are 8,192 MiB.

    Raises:
        QaromaError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gmt]?)i?b?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise QaromaError(f"got memory '{text}'; expected a size such as 8GiB or 8192MiB. Type: --vram 8GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def card_memory(text: str) -> int:
    """The bytes of a card by its name, as :func:`parse_card` takes it, or by its memory, as :func:`parse_memory` does.

    Raises:
        QaromaError: neither.
    """
    try:
        return parse_card(text).gib * 2**30
    except QaromaError:
        return parse_memory(text)


def this_card() -> tuple[int, Card | None] | None:
    """The memory of this machine's GPU in bytes, and what it is known to do; None where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    found: Any = torch.cuda.get_device_properties(0)
    known = [card for card in _CARDS if found.name == (card.reported or f"NVIDIA {card.title}")]
    return found.total_memory, known[0] if known else None
