"""Streams as the order of events knows them: who has seen how much of whom (vector clocks)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


class Stream:
    """Stands in for ``torch.cuda.Stream``: a queue, the kernels queued on it, and what it has waited for."""

    def __init__(self, device: object = None, priority: int = 0, *, name: str = "") -> None:
        self.name = name or "side stream"
        self.now = 0
        self.seen: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        for known, time in {**other.seen, other: other.now}.items():
            self.seen[known] = max(self.seen.get(known, 0), time)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        for known, time in event.seen.items():
            self.seen[known] = max(self.seen.get(known, 0), time)


class Event:
    """Stands in for ``torch.cuda.Event``.

    Args:
        wait: how the host waits for one.
    """

    def __init__(self, *, blocking: bool = False, wait: Callable[[Event], None] | None = None) -> None:
        self.seen: dict[Stream, int] = {}
        self._wait = wait

    def synchronize(self) -> None:
        assert self._wait is not None
        self._wait(self)

    def record(self, stream: Stream) -> None:
        self.seen = {**stream.seen, stream: stream.now}

    def wait(self, stream: Stream) -> None:
        stream.wait_event(self)


@dataclass
class Memory:
    """One storage: where it was made, who last wrote it, who has read it since."""

    home: Stream
    bytes: int
    write: tuple[Stream, int] | None = None
    reads: dict[Stream, int] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)
    pinned: bool = False
    on_card: bool = False
    reference: object = None


class Order:
    """Follows storages and finds accesses that no wait puts in order.

    Attributes:
        races: what touched memory that another stream was at.
        freed_early: memory that its home stream gave back while another stream might still be at it.
        allocated, peak: bytes on the card that are alive, and the most there were.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self.default, self.host = Stream(name="default stream"), Stream(name="host")
        self.stack = [self.default]
        self.races: Counter[str] = Counter()
        self.freed_early: Counter[str] = Counter()
        self.allocated = self.peak = 0
        self._place = place
        self._memories: dict[int, Memory] = {}

    @property
    def current(self) -> Stream:
        return self.stack[-1]

    def memory(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._memories.get(key)
        if known is None:
            known = Memory(self.current, storage.nbytes(), on_card=tensor.is_cuda)
            known.reference = weakref.ref(storage, lambda _: self._free(key))
            self._memories[key] = known
            if known.on_card:
                self.allocated += known.bytes
                self.peak = max(self.peak, self.allocated)
        return known

    def queue(self, read: list[Tensor], written: list[Tensor]) -> None:
        """A kernel, or a copy by the card's engine, on the current stream."""
        self.current.now += 1
        for tensor in read:
            self._access(tensor, write=False)
        for tensor in written:
            self._access(tensor, write=True)

    def host_reads(self, tensor: Tensor) -> None:
        """An operation on the host: what the card's engine copied there must have arrived."""
        memory = self._memories.get(id(tensor.untyped_storage()))
        if memory is not None and memory.pinned and memory.write is not None:
            stream, time = memory.write
            if self.host.seen.get(stream, 0) < time:
                self.races[f"the host reads what the {stream.name} wrote in {self._place()}"] += 1

    def host_writes(self, tensor: Tensor) -> None:
        """An operation on the host: what the card's engine copies from there must have left."""
        memory = self._memories.get(id(tensor.untyped_storage()))
        for stream, time in memory.reads.items() if memory is not None and memory.pinned else ():
            if self.host.seen.get(stream, 0) < time:
                self.races[f"the host writes what the {stream.name} reads in {self._place()}"] += 1

    def _access(self, tensor: Tensor, *, write: bool) -> None:
        memory, stream = self.memory(tensor), self.current
        past = [("wrote", *memory.write)] if memory.write else []
        past += [("reads", *read) for read in memory.reads.items()] if write else []
        for did, other, time in past:
            if other is not stream and stream.seen.get(other, 0) < time:
                does = "writes" if write else "reads"
                self.races[f"the {stream.name} {does} what the {other.name} {did} in {self._place()}"] += 1
        if write:
            memory.write, memory.reads = (stream, stream.now), {}
        else:
            memory.reads[stream] = stream.now

    def _free(self, key: int) -> None:
        memory = self._memories.pop(key)
        if memory.on_card:
            self.allocated -= memory.bytes
        if memory.pinned:  # the host's caching allocator waits for the copies by itself
            return
        last = dict(memory.reads)
        if memory.write:
            stream, time = memory.write
            last[stream] = max(last.get(stream, 0), time)
        for stream, time in last.items():
            if stream is memory.home or stream in memory.recorded:
                continue
            if memory.home.seen.get(stream, 0) < time:
                self.freed_early[f"freed on the {memory.home.name} while the {stream.name} may be at it"] += 1
