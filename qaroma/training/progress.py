"""What a run shows while it trains: a live panel in a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qaroma.method.growth import GrowthEvent

PLAIN_LINES = 20  # progress lines of a run whose output is no terminal
_TOLD = ("accuracy", "margin")  # of preferences, beside the loss
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # points of the loss curve


class ProgressView:
    """The figures of ``metrics.jsonl`` as they come.

    In a terminal one panel at the bottom of the screen is drawn anew; what happened (growth,
    validation) is printed above it and stays. In a pipe there are lines alone, some twenty in all.

    Args:
        console: where to; stderr keeps stdout free for ``--json``.
        total: step budget.
        done: steps done before this process.
    """

    def __init__(self, console: Console, *, total: int, done: int = 0) -> None:
        self.console, self.total = console, total
        self.every = max(1, total // PLAIN_LINES)
        self.losses: deque[float] = deque(maxlen=_WIDTH)
        self.figures: dict[str, str] = {}
        self.bar = Progress(
            TextColumn("step"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left at most"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("train", total=total, completed=done)
        self.live = Live(self._panel(), console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> ProgressView:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def step(self, record: Mapping[str, Any], events: Sequence[GrowthEvent]) -> None:
        """One optimiser step, and what grew after it."""
        self.losses.append(record["loss"])
        self.figures |= {
            "loss": f"{record['loss']:.3f}",
            **{name: f"{record[name]:.3f}" for name in _TOLD if name in record},
            "lr": f"{record['learning_rate']:.1e}",
            "rank": f"{record['mean_rank']:.2f}",
            "active": f"{record['active_modules']}",
            "params": f"{record['trainable_parameters']:,}",
            "tok/s": f"{record['tokens_per_second']:,.0f}",
            "GiB": f"{record['memory_bytes'] / 2**30:.2f}",
        }
        self.bar.update(self.task, completed=record["step"])
        self._draw()
        if self.live is None and (record["step"] % self.every == 0 or record["step"] == self.total):
            f = self.figures
            told = "".join(f"{name} {f[name]}  " for name in _TOLD if name in f)
            line = (
                f"loss {f['loss']}  {told}lr {f['lr']}  rank {f['rank']}  active {f['active']}  params {f['params']}  "
                f"{f['tok/s']} tok/s  {f['GiB']} GiB"
            )
            self.console.print(f"step {record['step']}/{self.total}  {line}", highlight=False, soft_wrap=True)
        if events:
            counts = Counter(e.decision for e in events)
            said = {"commit": "grew by a component", "done": "are done", "keep": "keep their last component"}
            text = ", ".join(f"{n} modules {said[decision]}" for decision, n in counts.items())
            self.console.print(f"step {record['step']}: {text}", highlight=False)

    def validation(self, step: int, figures: Mapping[str, Any], metric: str, *, best: bool) -> None:
        """A validation pass: the loss, the figure that counts where it is another, and what is told of preferences."""
        mark = " (best so far)" if best else ""
        others = [metric] if metric != "loss" else [name for name in _TOLD if name in figures]
        shown = "".join(f", {name} {figures[name]:.4f}" for name in others)
        self.console.print(f"step {step}: validation loss {figures['loss']:.4f}{shown}{mark}", highlight=False)
        self.figures["validation"] = f"{figures[metric]:.4f}" + ("" if metric == "loss" else f" {metric}")
        self._draw()

    def _draw(self) -> None:
        if self.live:
            self.live.update(self._panel())

    def _panel(self) -> RenderableType:
        """The loss curve, the figures in two rows, and the bar."""
        table = Table.grid(padding=(0, 2))
        names = ("loss", *_TOLD, "validation", "lr", "rank", "active", "params", "tok/s", "GiB")
        shown = [name for name in names if name in self.figures]
        table.add_row(*(Text(name, style="dim") for name in shown))
        table.add_row(*(Text(self.figures[name], style="bold") for name in shown))
        return Group(Text(curve(self.losses), style="cyan"), table, self.bar)


def curve(values: Sequence[float] | deque[float]) -> str:
    """Values as bars of text, the smallest lowest; empty without values."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
