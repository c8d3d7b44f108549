"""Counting the bytes that are alive while code runs, on real tensors or fake ones."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qaroma.engine.host import as_torch_takes_it
from qaroma.method.pieces import every_piece
from qaroma.plan.weightless import KnownShapes
from qaroma.plan.work import Kernel
from qaroma.plan.workspaces import workspace_bytes

WORKSPACE = "kernel_workspaces"
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.copy_.default}


@dataclass(frozen=True)
class Peak:
    """The most bytes of a phase: how many, and of which categories."""

    bytes: int
    categories: dict[str, int]


@dataclass
class Memory:
    """What one memory holds now, and the most that it held in each phase."""

    now: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, Peak] = field(default_factory=dict)

    @property
    def peak(self) -> Peak:
        """The largest of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes, default=Peak(0, {}))

    def add(self, category: str, size: int) -> None:
        self.now += size
        self.categories[category] += size

    def note(self, phase: str) -> None:
        """Keep what there is now if the phase never had more."""
        known = self.peaks.get(phase)
        if known is None or self.now > known.bytes:
            self.peaks[phase] = Peak(self.now, {name: size for name, size in self.categories.items() if size})


@dataclass
class _Entry:
    reference: weakref.ref[Any]  # held for its callback
    bytes: int
    category: str
    memory: Memory


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation inside the block returns, until it dies.

    A storage counts once however many tensors view it, at its whole size, from the operation that
    made it until nothing refers to it any more (autograd's saved tensors do). What an operation
    allocates and frees inside itself is not seen, but for what :func:`workspace_bytes` knows. A phase's
    peak is known when the phase has ended.

    Attributes:
        phase_now: name of the phase.
        device, host: the two memories; everything is on the device but what :meth:`copy_to_host` and
            :meth:`pinned_bytes` made, which take the place of :class:`qaroma.engine.host.ThisHost`'s, and what is
            computed from that, which is no kernel of a card's.
        parked: bytes that were asked of :meth:`pinned_bytes`.
        category: what new storages are booked under.
        kernels: that ran in each phase on weightless tensors.
        sent, fetched: bytes that went from the device to the host, and from the host to the device, in each phase.

    Args:
        shapes: runs operations on weightless tensors; None runs them as they are, and counts no kernels.
        card: whether what kernels take inside themselves on a card is counted.
    """

    def __init__(self, shapes: KnownShapes | None = None, *, card: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: defaultdict[str, Counter[Kernel]] = defaultdict(Counter)
        self._shapes, self._card = shapes, card
        self._times = 1
        self.sent: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()
        self.device, self.host, self.parked = Memory(), Memory(), 0
        self.category, self.phase_now = "other", "setup"
        self._entries: dict[int, _Entry] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kernel = None
        if self._shapes is None:
            result = func(*args, **(kwargs or {}))
        else:
            result, kernel = self._shapes.run(func, args, kwargs or {})
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if func in _COPIES and self._crosses(args, result):
            kernel = None
        elif self.host.now and any(self._is_on_host(value) for value in args):
            self._on_host(result)
            kernel = None
        if kernel is not None:
            self.kernels[self.phase_now][kernel] += self._times
        inside = workspace_bytes(func, args) if self._card else 0
        if inside:
            self.device.add(WORKSPACE, inside)
            self._note()
            self.device.add(WORKSPACE, -inside)
        return result

    def __exit__(self, *error: Any) -> None:
        self._note()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def phase(self, name: str, category: str) -> None:
        """Begin another phase, which has its own peak; new storages are booked under ``category``."""
        self._note()
        self.phase_now, self.category = name, category
        self._note()

    def forget_phases(self, but: Sequence[str]) -> None:
        """Forget what was counted in all phases but these, the last of which goes on, and what was asked of
        :meth:`pinned_bytes`."""
        for of_phases in (self.device.peaks, self.host.peaks, self.kernels, self.sent, self.fetched):
            for phase in [phase for phase in of_phases if phase not in but]:
                del of_phases[phase]
        self.phase_now, self.parked = but[-1], 0

    def adopt(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count tensors that were made outside the block, or book known ones under another category."""
        for tensor in tensors:
            entry = self._see(tensor)
            self._move(entry, category, entry.memory)

    def copy_to_host(self, tensor: Tensor, *, pinned: bool = True) -> Tensor:
        """A copy on the tensor's own device that counts in the host's memory, with all that torch takes for a pinned
        one."""
        values = tensor.numel()
        size = values * tensor.element_size()
        room = tensor.new_empty(as_torch_takes_it(size) // tensor.element_size() if pinned else values)
        return self._on_host(room)[:values].view(tensor.shape).copy_(tensor)

    def is_apart(self, device: torch.device) -> bool:
        """Every device, whatever it is."""
        return True

    def pinned_bytes(self, size: int, device: torch.device) -> Tensor:
        """Bytes on a device that count in the host's memory, with all that torch takes for pinned ones."""
        self.parked += size
        return self._on_host(torch.empty(as_torch_takes_it(size), dtype=torch.uint8, device=device))[:size]

    def _on_host(self, tensor: Tensor) -> Tensor:
        entry = self._see(tensor)
        self._move(entry, entry.category, self.host)
        return tensor

    def few_pieces(self, rows: int, size: int, *, first: int = 0) -> Iterator[slice]:
        """In place of :func:`qaroma.method.pieces.every_piece` where nothing has contents: the pieces that differ.

        These are the first ones, one that stands for all after them, and the last where it is smaller.
        """
        yield from islice(every_piece(rows, size), first)
        alike = rows // size - first
        if alike > 0:
            self._times *= alike
            yield slice(first * size, (first + 1) * size)
            self._times //= alike
        if rows % size and rows // size >= first:
            yield slice(rows - rows % size, rows)

    def _is_on_host(self, value: Any) -> bool:
        entry = self._entries.get(id(value.untyped_storage())) if isinstance(value, Tensor) else None
        return entry is not None and entry.memory is self.host

    def _crosses(self, args: tuple[Any, ...], result: Tensor) -> bool:
        """Whether a copy goes over the bus, where it is counted, and not by a kernel."""
        source, target = self._see(args[min(1, len(args) - 1)]).memory, self._see(result).memory
        if source is target:
            return False
        way = self.sent if target is self.host else self.fetched
        way[self.phase_now] += self._times * result.nbytes
        return True

    def _see(self, tensor: Tensor) -> _Entry:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        entry = self._entries.get(key)
        if entry is None:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            entry = _Entry(reference, 0, self.category, self.device)
            self._entries[key] = entry
        if size != entry.bytes:  # new, or resized in place
            if size < entry.bytes:
                self._note()
            entry.memory.add(entry.category, size - entry.bytes)
            entry.bytes = size
        return entry

    def _forget(self, key: int) -> None:
        self._note()
        entry = self._entries.pop(key)
        entry.memory.add(entry.category, -entry.bytes)

    def _move(self, entry: _Entry, category: str, memory: Memory) -> None:
        entry.memory.add(entry.category, -entry.bytes)
        entry.category, entry.memory = category, memory
        memory.add(category, entry.bytes)

    def _note(self) -> None:
        """Look for a peak. Called before the bytes fall, which is when one has been reached; so a copy that
        is booked on the host right after it was made never counts as the device's."""
        for memory in (self.device, self.host):
            memory.note(self.phase_now)
