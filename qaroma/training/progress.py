"""What a run shows while it trains: a live line in a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qaroma.method.growth import GrowthEvent

PLAIN_LINES = 20  # progress lines of a run whose output is no terminal


class ProgressView:
    """A progress bar with the figures of ``metrics.jsonl``.

    Args:
        console: where to; stderr keeps stdout free for ``--json``.
        total: step budget.
        done: steps done before this process.
    """

    def __init__(self, console: Console, *, total: int, done: int = 0) -> None:
        self.console, self.total = console, total
        self.every = max(1, total // PLAIN_LINES)
        self.bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, figures="")

    def __enter__(self) -> ProgressView:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, record: Mapping[str, Any], events: Sequence[GrowthEvent]) -> None:
        """One optimiser step, and what grew after it."""
        figures = (
            f"loss {record['loss']:.3f}  lr {record['learning_rate']:.1e}  rank {record['mean_rank']:.2f}  "
            f"active {record['active_modules']}  params {record['trainable_parameters']:,}  "
            f"{record['tokens_per_second']:,.0f} tok/s  {record['memory_bytes'] / 2**30:.2f} GiB"
        )
        self.bar.update(self.task, completed=record["step"], figures=figures)
        if not self.console.is_terminal and (record["step"] % self.every == 0 or record["step"] == self.total):
            self.console.print(f"step {record['step']}/{self.total}  {figures}", highlight=False, soft_wrap=True)
        if events:
            counts = Counter(e.decision for e in events)
            said = {"commit": "grew by a component", "done": "are done", "keep": "keep their last component"}
            text = ", ".join(f"{n} modules {said[decision]}" for decision, n in counts.items())
            self.console.print(f"step {record['step']}: {text}", highlight=False)

    def validation(self, step: int, figures: Mapping[str, Any], metric: str, *, best: bool) -> None:
        """A validation pass: the loss, and the figure that counts where it is another."""
        mark = " (best so far)" if best else ""
        other = "" if metric == "loss" else f", {metric} {figures[metric]:.4f}"
        self.console.print(f"step {step}: validation loss {figures['loss']:.4f}{other}{mark}", highlight=False)
