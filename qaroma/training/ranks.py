"""Several processes that train one run: each takes its share of every step's micro-batches, and all decide alike.

torch.distributed carries it: tensors of the cards go by NCCL, those of a CPU and all that is agreed on by gloo. A
process that is alone is the case with one rank; nothing is sent then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qaroma.engine.no_memory import card_is_full
from qaroma.errors import QaromaError, ToldElsewhereError

Result = TypeVar("Result")
Item = TypeVar("Item")

# How long a rank is waited for. One that has ended is noticed at once, by its closed connection; these are for one that
# hangs, or a machine that lost its power. While the first rank validates, samples or saves, the others wait longer.
STEP_MINUTES, FIRST_HOURS = 30, 24


class RankLostError(QaromaError):
    """Another process of the run has ended, or does not answer."""

    def __init__(self) -> None:
        super().__init__(
            f"another process of this run has ended, or has not answered for {STEP_MINUTES} minutes; what it said of "
            "it stands above."
        )


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        number: of this process, from 0.
        count: of all.
        ordered: sums are made in the order of the micro-batches, as one process makes them.
    """

    def __init__(self, number: int = 0, count: int = 1, *, ordered: bool = True) -> None:
        self.number, self.count, self.ordered = number, count, ordered
        if count > 1:
            self._steps = dist.new_group(backend="gloo", timeout=timedelta(minutes=STEP_MINUTES))
            self._waits = dist.new_group(backend="gloo", timeout=timedelta(hours=FIRST_HOURS))

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that validates, writes and speaks."""
        return self.number == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that are this rank's: neighbours, so that the ranks' shares one after the other are all items."""
        each, over = divmod(len(items), self.count)
        start = self.number * each + min(self.number, over)
        return items[start : start + each + (self.number < over)]

    def any(self, said: bool) -> bool:
        """Whether any rank says so."""
        if self.alone:
            return said
        flag = torch.tensor(int(said))
        with _losses_told():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._steps)
        return bool(flag)

    def most(self, number: int) -> int:
        """The largest number of all ranks."""
        if self.alone:
            return number
        return max(self._gathered(number, self._waits))

    def first(self, work: Callable[[], Result]) -> Result:
        """What the first rank's work gives, on all of them; the others wait for it.

        Raises:
            QaromaError: that of the work; on the other ranks one that is not told again.
            torch.OutOfMemoryError: on all ranks where the first one has no memory for it.
        """
        if self.alone:
            return work()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:
                failure, outcome[1] = error, "memory" if card_is_full(error) else "other"
        with _losses_told():
            dist.broadcast_object_list(outcome, src=0, group=self._waits)
        if failure is not None:
            raise failure
        _raise_as(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def together(self, work: Callable[[], Result]) -> Result:
        """What every rank does alike; where it fails on some, all end, and the lowest of these says why.

        Raises:
            QaromaError: that of the work; on the other ranks one that is not told again.
        """
        if self.alone:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        failed = [rank for rank, fault in enumerate(self._gathered(failure is not None, self._waits)) if fault]
        if failed and (failure is None or failed[0] != self.number):
            raise ToldElsewhereError from failure
        if failure is not None:
            raise failure
        return result

    def require_same(self, state: Callable[[], Mapping[str, Any]], when: str, hint: str) -> None:
        """See to it that all ranks hold the same.

        Args:
            state: gives tensors, and values of JSON, by name.
            when: a clause that says when they were compared.
            hint: what to type where they differ.

        Raises:
            QaromaError: names a rank that differs from the first one, and in what.
        """
        if self.alone:
            return
        digests = self._gathered({name: _digest(value) for name, value in state().items()}, self._steps)
        for rank, other in enumerate(digests):
            differing = [name for name in {**digests[0], **other} if other.get(name) != digests[0].get(name)]
            if differing and not self.is_first:
                raise ToldElsewhereError
            if differing:
                others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
                raise QaromaError(
                    f"rank {rank} has another {differing[0]}{others} than rank 0 {when}, where all ranks must have the "
                    f"same. Nothing of it was saved. {hint}"
                )

    def _gathered(self, value: Result, group: Any) -> list[Result]:
        found: list[Any] = [None] * self.count
        with _losses_told():
            dist.all_gather_object(found, value, group=group)
        return found


class StepSum:
    """What the micro-batches of a step add up to over all ranks: gradients, and the figures beside them.

    Between two micro-batches a lone process does nothing, autograd adds. In order the others set theirs aside, one by
    one: the first rank's sum then goes from rank to rank, each adds its own, and the last one gives it to all. So the
    sum is that of one process to the bit, and holds for any number of ranks.

    Args:
        ranks: that add.
        tensors: fp32, zero at first; each micro-batch adds to them in place.
    """

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor]) -> None:
        self.ranks, self.tensors = ranks, tensors
        self._aside: list[Tensor] = []
        self._total: Tensor | None = None

    def micro_batch_done(self) -> None:
        if self.ranks.ordered and not self.ranks.is_first:
            self._aside.append(self._flat())
            for tensor in self.tensors:
                tensor.zero_()

    def share_done(self) -> None:
        """Make this rank's message ready, while it can still tell the others that it has no memory for it."""
        if not self.ranks.alone:
            self._total = self._flat()

    def over_all_ranks(self) -> None:
        """Put the sum over all ranks into the tensors, all of them in one message."""
        total = self._total
        if total is None:
            return
        with _losses_told():
            if self.ranks.ordered:
                self._in_order(total)
            else:
                dist.all_reduce(total)
        parts = torch.split(total, [tensor.numel() for tensor in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def _in_order(self, total: Tensor) -> None:
        last = self.ranks.count - 1
        if not self.ranks.is_first:
            dist.recv(total, self.ranks.number - 1)
        for own in self._aside:
            total += own
        if self.ranks.number < last:
            dist.send(total, self.ranks.number + 1)
        dist.broadcast(total, last)

    def _flat(self) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors])


@contextmanager
def joined(device: str, reduce: str = "auto", *, deterministic: bool = False) -> Iterator[Ranks]:
    """The ranks that ``torchrun``, ``accelerate launch`` or ``--gpus`` started; one where nobody did.

    Args:
        device, reduce, deterministic: as the configuration's section ``training`` has them.

    Raises:
        QaromaError: a rank without a card of its own, or a launcher that would split the model.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise QaromaError(
                f"got accelerate with {way}, which would split the model; every card holds the whole 4-bit base. Type: "
                "accelerate launch --multi_gpu -m qaroma finetune ..."
            )
    on_cards = device != "cpu" and torch.cuda.is_available()
    if on_cards:
        place, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= cards:
            raise QaromaError(f"got process {place + 1} on a machine with {cards} cards; start one process a card")
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if on_cards else "gloo",
        timeout=timedelta(minutes=STEP_MINUTES),
        device_id=torch.device("cuda", place) if on_cards else None,  # what NCCL takes of a card it takes now
    )
    if dist.get_rank() > 0:
        logging.disable(logging.WARNING)  # the first rank warns of the same
    ordered = reduce == "ordered" or (reduce == "auto" and (deterministic or not on_cards))
    try:
        yield Ranks(dist.get_rank(), count, ordered=ordered)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _losses_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch.distributed: a connection that was closed, a time that is over
        if card_is_full(error):
            raise
        raise RankLostError from error


def _raise_as(failed: str | None) -> None:
    """Fail as the first rank has failed."""
    if failed == "memory":
        raise torch.OutOfMemoryError("the first rank has no memory left")
    if failed is not None:
        raise ToldElsewhereError


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
