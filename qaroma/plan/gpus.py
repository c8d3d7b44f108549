"""Several GPUs that share the micro-batches of a step: what they send each other, and how long a step then takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from qaroma.plan.card import Card
from qaroma.plan.search import Estimate
from qaroma.plan.work import COPIES, Work

PCIE3_X8 = 6.0  # GB/s in one direction, of 7.9: what two cards of one board often have between them


@dataclass(frozen=True)
class SharedStep:
    """An optimiser step on several GPUs, each of which holds the model whole.

    Attributes:
        gpus: that share it; one shares nothing.
        grad_accum: its micro-batches.
        gradients: bytes of the flat fp32 buffer, of which a copy is summed over the GPUs once a step.
    """

    gpus: int
    grad_accum: int
    gradients: int

    @property
    def alone(self) -> SharedStep:
        """The same step on one GPU."""
        return replace(self, gpus=1)

    def peak(self, found: Estimate) -> int:
        """The most bytes on a GPU: the copy of the gradients is there when the activations are gone."""
        return found.peak if self.gpus == 1 else max(found.peak, found.resident + self.gradients)

    @property
    def traffic(self) -> int:
        """Bytes that each GPU sends in a step, and is sent: a ring all-reduce moves 2 (N-1)/N of the buffer."""
        return 2 * (self.gpus - 1) * self.gradients // self.gpus

    def reducing(self, rate: float) -> float:
        """Seconds of the all-reduce, beside which nothing computes.

        Args:
            rate: GB/s between two GPUs in one direction.
        """
        return self.traffic / (rate * 1e9)

    def seconds(self, work: dict[str, Work], card: Card, rate: float) -> float:
        """Of the whole step.

        Args:
            work: of one micro-batch, and of the update.
            card: that each GPU is.
            rate: as :meth:`reducing` takes it.
        """
        passes = sum(phase.seconds(card) for name, phase in work.items() if name != "update")
        return passes * self.grad_accum / self.gpus + work["update"].seconds(card) + self.reducing(rate)

    def to_json(self, shown: Estimate, fastest: Iterable[tuple[Card, Estimate]]) -> dict[str, Any]:
        """Every figure, in bytes and seconds by arithmetic.

        Args:
            shown: the step whose bytes are laid out.
            fastest: as :func:`shared_table` takes it.
        """
        return {
            "count": self.gpus,
            "grad_accum": self.grad_accum,
            "peak_bytes": self.peak(shown),
            "host_bytes": self.gpus * shown.host,
            "gradient_bytes": self.gradients,
            "traffic_bytes": self.traffic,
            "reduce_seconds": self.reducing(PCIE3_X8),
            "steps": {
                card.title: {
                    "memory_level": found.settings.level,
                    "seconds_on_one": self.alone.seconds(found.work, card, PCIE3_X8),
                    "seconds": self.seconds(found.work, card, PCIE3_X8),
                    "own_bus_reduce_seconds": self.reducing(_own_bus(card)),
                    "own_bus_seconds": self.seconds(found.work, card, _own_bus(card)),
                }
                for card, found in fastest
            },
        }


def shared_table(step: SharedStep, fastest: Iterable[tuple[Card, Estimate]]) -> Table:
    """A row for each card: a step on one and on all, and what of it the all-reduce takes.

    Args:
        step: on how many.
        fastest: each card with the step at the fastest level that fits it.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("card", no_wrap=True)
    for name in ("level", "on one", f"on {step.gpus}", "all-reduce, PCIe 3 x8", "all-reduce, its own bus"):
        table.add_column(name, justify="right")
    for card, found in fastest:
        times = [step.alone.seconds(found.work, card, PCIE3_X8), step.seconds(found.work, card, PCIE3_X8)]
        row = [str(found.settings.level), *(f"{time:.3g} s" for time in times)]
        for rate in (PCIE3_X8, _own_bus(card)):
            reducing = step.reducing(rate)
            share = reducing / step.seconds(found.work, card, rate)
            row.append(f"{1e3 * reducing:.3g} ms, {100 * share:.2g} %")
        table.add_row(card.title, *row)
    return table


def _own_bus(card: Card) -> float:
    """GB/s that its bus comes to in one direction."""
    return COPIES * card.pcie
