"""Host memory: what is copied there to stay, and pinned memory in which tensors of a device wait for their turn."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as of an allocation of CUDA's own
SMALLEST_PIECE = 2**20


class Host(Protocol):
    """The memory of the host: :class:`ThisHost`, or one that takes note of what it is asked for."""

    def copy_to_host(self, tensor: Tensor, *, pinned: bool = True) -> Tensor:
        """A copy in host memory; a tensor that lies there already is returned as it is.

        Args:
            tensor: on any device.
            pinned: in memory that the card reads and writes by itself, of which torch takes powers of two.
        """
        ...

    def is_apart(self, device: torch.device) -> bool:
        """Whether it is another memory than a device's."""
        ...

    def pinned_bytes(self, size: int, device: torch.device) -> Tensor:
        """So many pinned bytes for copies from and to a device."""
        ...


class ThisHost:
    """The memory of this machine; the devices that have one of their own are its cards."""

    def copy_to_host(self, tensor: Tensor, *, pinned: bool = True) -> Tensor:
        if not self.is_apart(tensor.device):
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)

    def is_apart(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def pinned_bytes(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


THIS_HOST = ThisHost()


def aligned(size: int) -> int:
    """Bytes that so many take where the next ones begin at a multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def piece_sizes(size: int) -> list[int]:
    """Powers of two that add up to a size, largest first, and a small rest: torch rounds pinned memory up to such."""
    sizes = []
    while size > SMALLEST_PIECE:
        sizes.append(2 ** (size.bit_length() - 1))
        size -= sizes[-1]
    return [*sizes, size] if size else sizes


def as_torch_takes_it(size: int) -> int:
    """Bytes of a piece of pinned memory."""
    return 1 << max(0, size - 1).bit_length()


def pinned_for(size: int) -> int:
    """Bytes that :class:`Parking` takes for so many."""
    return sum(map(as_torch_takes_it, piece_sizes(size)))


class Parking:
    """Pinned memory where what waits lies one behind the other, and what leaves makes room for what comes.

    It grows to the most that ever waits at a time, in pieces of which torch rounds up only the last, and stays. Taken
    and given back by the tensor, torch would keep of each power of two as many as there ever were.

    Args:
        host: whose memory it is.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pieces: list[Tensor] = []
        self._ends: dict[int, int] = {}  # by its beginning that of each that waits; the last came last

    @property
    def bytes(self) -> int:
        return sum(len(piece) for piece in self._pieces)

    def reserve(self, size: int, device: torch.device) -> None:
        """Have room for so many bytes more than wait now."""
        missing = self._top() + size - self.bytes
        self._pieces += [self._host.pinned_bytes(piece, device) for piece in piece_sizes(max(0, missing))]

    def enter(self, size: int, device: torch.device) -> tuple[int, list[Tensor]]:
        """A place behind the last one that is taken: where it begins, and its bytes, piece by piece."""
        self.reserve(aligned(size), device)
        place = self._top()
        self._ends[place] = place + aligned(size)
        found, start = [], place  # as seen from where a piece begins
        for piece in self._pieces:
            if start < len(piece) and size:
                found.append(piece[start : start + size])
                size -= len(found[-1])
            start = max(0, start - len(piece))
        return place, found

    def leave(self, place: int) -> None:
        """Whatever is queued for the place from here on must run behind what has been queued."""
        del self._ends[place]

    def _top(self) -> int:
        return next(reversed(self._ends.values()), 0)
