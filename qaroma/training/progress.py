"""What a run shows while it trains: a live panel in a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qaroma.config.words import duration
from qaroma.method.growth import GrowthEvent

PLAIN_LINES = 20  # progress lines of a run whose output is no terminal
_TOLD = ("accuracy", "margin")  # of preferences, beside the loss
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # points of the loss curve
_Item = TypeVar("_Item")


class TimeLeft:
    """The time that a run may take yet, from what its steps and all between them have taken so far.

    Args:
        total: step budget.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.ends: list[tuple[int, float]] = []  # of the first step in this process, and of the last

    def step(self, step: int, now: float) -> bool:
        """A step has ended; gives whether it was the second, from which on the time is known."""
        second = len(self.ends) == 1
        self.ends = [*self.ends[:1], (step, now)]
        return second

    def seconds(self, now: float) -> float | None:
        """Until the step budget is spent; None before the second step, and after the last."""
        if len(self.ends) < 2 or self.ends[-1][0] >= self.total:
            return None
        (first, begun), (last, ended) = self.ends
        whole = (ended - begun) / (last - first) * (self.total - last)
        return max(0.0, whole - (now - ended))

    def words(self, now: float) -> str:
        """The same for people; empty where it is not known."""
        seconds = self.seconds(now)
        return "" if seconds is None else f"at most {duration(seconds)} left"


class _TimeLeftColumn(ProgressColumn):
    def __init__(self, left: TimeLeft) -> None:
        super().__init__()
        self.left = left

    def render(self, task: Task) -> Text:
        return Text(self.left.words(time.monotonic()), style="cyan")


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
        self.left = TimeLeft(total)
        self.losses: deque[float] = deque(maxlen=_WIDTH)
        self.figures: dict[str, str] = {}
        self.bar = Progress(
            TextColumn("step"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeftColumn(self.left),
            console=console,
        )
        self.task = self.bar.add_task("train", total=total, completed=done)
        self.doing = ""
        self.live = Live(self.panel(), console=console, refresh_per_second=4) if console.is_terminal else None

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
        second = self.left.step(record["step"], time.monotonic())
        self._draw()
        if self.live is None:
            self._tell(record["step"], second)
        if events:
            counts = Counter(e.decision for e in events)
            said = {"commit": "grew by a component", "done": "are done", "keep": "keep their last component"}
            text = ", ".join(f"{n} modules {said[decision]}" for decision, n in counts.items())
            self.console.print(f"step {record['step']}: {text}", highlight=False)

    def _tell(self, step: int, second: bool) -> None:
        """A line in a pipe: the figures now and then, the time left as soon as it is known."""
        f, left = self.figures, self.left.words(time.monotonic())
        if step % self.every == 0 or step == self.total:
            told = "".join(f"{name} {f[name]}  " for name in _TOLD if name in f)
            line = (
                f"loss {f['loss']}  {told}lr {f['lr']}  rank {f['rank']}  active {f['active']}  params {f['params']}  "
                f"{f['tok/s']} tok/s  {f['GiB']} GiB  {left}"
            )
            self.console.print(f"step {step}/{self.total}  {line.rstrip()}", highlight=False, soft_wrap=True)
        elif second:
            self.console.print(f"step {step}/{self.total}  {left}", highlight=False, soft_wrap=True)

    def validation(self, step: int, figures: Mapping[str, Any], metric: str, *, best: bool) -> None:
        """A validation pass: the loss, the figure that counts where it is another, and what is told of preferences."""
        mark = " (best so far)" if best else ""
        others = [metric] if metric != "loss" else [name for name in _TOLD if name in figures]
        shown = "".join(f", {name} {figures[name]:.4f}" for name in others)
        self.console.print(f"step {step}: validation loss {figures['loss']:.4f}{shown}{mark}", highlight=False)
        self.figures["validation"] = f"{figures[metric]:.4f}" + ("" if metric == "loss" else f" {metric}")
        self._draw()

    def counted(self, items: Sequence[_Item], what: str) -> Iterator[_Item]:
        """The items, with what is being done and how many of them are done shown in a terminal."""
        for number, item in enumerate(items):
            self.doing = f"{what}, {number} of {len(items)} batches done"
            self._draw()
            yield item
        self.doing = ""
        self._draw()

    def _draw(self) -> None:
        if self.live:
            self.live.update(self.panel())

    def panel(self) -> RenderableType:
        """The loss curve, the figures in two rows, what is being done, and the bar."""
        table = Table.grid(padding=(0, 2))
        names = ("loss", *_TOLD, "validation", "lr", "rank", "active", "params", "tok/s", "GiB")
        shown = [name for name in names if name in self.figures]
        while (
            len(shown) > 1 and sum(max(len(name), len(self.figures[name])) + 2 for name in shown) > self.console.width
        ):
            shown.pop()  # the last ones matter least
        table.add_row(*(Text(name, style="dim") for name in shown))
        table.add_row(*(Text(self.figures[name], style="bold") for name in shown))
        return Group(Text(curve(self.losses), style="cyan"), table, Text(self.doing, style="dim"), self.bar)


def curve(values: Sequence[float] | deque[float]) -> str:
    """Values as bars of text, the smallest lowest; empty without values."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
