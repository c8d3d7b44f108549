"""What the line figures show: which series, under which names, on which axes. No drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from qaroma.report.names import module_labels
from qaroma.runs.figures import validation_of
from qaroma.runs.reading import Run, Series

MOST_POINTS = 400  # a line of more is thinned: a page holds ten of them
MOST_MODULES = 5
_LOG_FROM = 30.0  # largest by smallest value from which a loss is drawn logarithmically
_SMOOTH_FROM = 40
_OF_PAIRS = {
    "accuracy": "Pairs whose chosen answer gained more (running mean)",
    "margin": "Margin of the chosen answer (running mean)",
}


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Args:
        label: its name in the legend; empty leaves it out of it.
        series: what is drawn.
        colour: place in the palette.
        style: 0 solid, 1 dashed, 2 dotted, 3 dash-dotted.
        pale: drawn behind the others.
        marked: each point has a mark (validations).
    """

    label: str
    series: Series
    colour: int = 0
    style: int = 0
    pale: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        key: short name, for ids.
        title: what is shown.
        lines: in drawing order.
        last: the last step of all runs.
        steps: values hold until the next one (ranks), instead of being joined.
        logarithmic: the values' axis is.
        from_zero: the values' axis begins at zero.
        seconds: of training until each step, for times beside the steps; empty where several runs have several.
        kept: step and value of the adapter that was kept, which are marked.
    """

    key: str
    title: str
    lines: Sequence[Line]
    last: int
    steps: bool = False
    logarithmic: bool = False
    from_zero: bool = False
    seconds: Series = field(default_factory=Series)
    kept: tuple[int, float] | None = None

    @property
    def names(self) -> int:
        """How many of its lines have one."""
        return sum(bool(line.label) for line in self.lines)

    @property
    def flat(self) -> bool:
        """Whether nothing in it ever changes."""
        return len({value for line in self.lines for value in line.series.values}) < 2

    @property
    def finding(self) -> str:
        """What it shows, as a sentence: where its lines begin and end."""
        told = [
            f"{line.label or 'it'} goes from {line.series.values[0]:.4g} to {line.series.values[-1]:.4g}"
            for line in self.lines
            if len(line.series) and not line.pale
        ]
        kept = f"; the adapter is of step {self.kept[0]:,}" if self.kept else ""
        return f"{self.title} over {self.last:,} steps: {', '.join(told[:MOST_MODULES])}{kept}."


def learning_panel(run: Run) -> Panel:
    """How one run learned: the validations that choose its adapter, and the training loss where they are losses too."""
    metric, points = run.metric, run.validation(run.metric)
    lines = [Line("validation", points, 0, marked=True)]
    if metric == "loss" or not len(points):
        lines.append(Line("training", thinned(running_mean(run.series("loss"))), 6))
    lines = [line for line in lines if len(line.series)]
    title = metric.replace("_", " ").capitalize() if len(points) else "Training loss"
    best = validation_of(run, metric)
    kept = (best.best_step, best.best) if best and best.best_step else None
    return Panel(
        "learning", title, lines, run.step, logarithmic=metric == "loss" and _wide(lines),
        seconds=training_time(run), kept=kept,
    )  # fmt: skip


def training_time(run: Run) -> Series:
    """Seconds of training until each step; empty where not every step noted its own."""
    each = run.series("seconds")
    return Series(each.steps, list(accumulate(each.values))) if len(each) == len(run.steps) else Series()


def growth_panels(runs: Sequence[Run], modules: Sequence[str], metric: str) -> list[Panel]:
    """The paper's Figure 1: trainable parameters, total rank, ranks of modules, and the metric.

    Args:
        runs: one or several; each is a line, with its name in the legend where there are several.
        modules: full names of the modules whose rank is shown.
        metric: of the validations.

    Returns:
        The panels that the runs have something to show for.
    """
    metric_title = "Validation loss" if metric == "loss" else f"Validation {metric}"
    last = max(run.step for run in runs)
    by_metric = _of_runs(runs, [run.validation(metric) for run in runs], marked=True)
    panels = [
        Panel(
            "trainable",
            "Trainable parameters",
            _of_runs(runs, [thinned(run.series("trainable_parameters")) for run in runs]),
            last,
            steps=True,
            from_zero=True,
        ),
        Panel(
            "rank",
            "Total rank",
            _of_runs(runs, [thinned(run.total_rank().until(run.step)) for run in runs]),
            last,
            steps=True,
            from_zero=True,
        ),
        Panel("modules", "Rank of single modules", _module_lines(runs, modules), last, steps=True, from_zero=True),
        Panel("metric", metric_title, by_metric, last, logarithmic=metric == "loss" and _wide(by_metric)),
    ]
    return _drawable(panels, runs)


def training_panels(runs: Sequence[Run]) -> list[Panel]:
    """Loss, what is told of preferences beside it, and learning rate against the step."""
    lines = []
    for place, (run, name) in enumerate(zip(runs, _run_labels(runs), strict=True)):
        loss = run.series("loss")
        smooth = len(loss) >= _SMOOTH_FROM
        if smooth and len(runs) == 1:
            lines.append(Line("each step", thinned(loss), place, pale=True))
            lines.append(Line("running mean", thinned(running_mean(loss)), place))
        else:
            lines.append(Line(name, thinned(running_mean(loss) if smooth else loss), place, place % 4))
    rates = _of_runs(runs, [thinned(run.series("learning_rate")) for run in runs])
    last = max(run.step for run in runs)
    title = "Training loss" if len(runs) == 1 else "Training loss (running mean)"
    panels = [
        Panel("loss", title, lines, last, logarithmic=_wide(lines)),
        *(Panel(name, told, _smooth(runs, name), last) for name, told in _OF_PAIRS.items()),
        Panel("learning-rate", "Learning rate", rates, last, from_zero=True),
    ]
    return _drawable(panels, runs)


def _drawable(panels: Sequence[Panel], runs: Sequence[Run]) -> list[Panel]:
    """Those that have something to show, of one run with its time."""
    seconds = training_time(runs[0]) if len(runs) == 1 else Series()
    return [replace(panel, seconds=seconds) for panel in panels if any(len(line.series) for line in panel.lines)]


def _smooth(runs: Sequence[Run], name: str) -> list[Line]:
    """One figure of the steps, as a running mean: single steps of few pairs jump."""
    return _of_runs(runs, [thinned(running_mean(run.series(name))) for run in runs])


def choose_modules(run: Run, most: int = MOST_MODULES) -> list[str]:
    """Modules whose ranks went different ways: the commonest ways first, one module for each.

    Returns:
        Full names, those of the highest final rank first.
    """
    commonest = sorted(_ways(run).items(), key=lambda item: -len(item[1]))[:most]
    highest = sorted(commonest, key=lambda item: -item[0][-1])
    return [modules[len(modules) // 2] for _, modules in highest]


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most about ``most`` points that draw the same line: lowest and highest of equal parts, first and last."""
    if len(series) <= most:
        return series
    parts = most // 2
    kept = {0, len(series) - 1}
    for part in range(parts):
        start, end = part * len(series) // parts, (part + 1) * len(series) // parts
        inside = range(start, end)
        kept.add(min(inside, key=series.values.__getitem__))
        kept.add(max(inside, key=series.values.__getitem__))
    return Series([series.steps[i] for i in sorted(kept)], [series.values[i] for i in sorted(kept)])


def running_mean(series: Series, share: float = 1 / 30) -> Series:
    """Each value's mean with its neighbours: ``share`` of the series, symmetric, shorter at both ends."""
    reach = max(1, round(len(series) * share / 2))
    sums = [0.0]
    for value in series.values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(series)):
        near = min(reach, place, len(series) - 1 - place)
        means.append((sums[place + near + 1] - sums[place - near]) / (2 * near + 1))
    return Series(series.steps, means)


def _ways(run: Run) -> dict[tuple[int, ...], list[str]]:
    """The modules by how their ranks went."""
    ways: dict[tuple[int, ...], list[str]] = {}
    for module in run.modules():
        ways.setdefault(tuple(ranks.get(module, 0) for _, ranks in run.ranks), []).append(module)
    return ways


def _run_labels(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else [""]


def _of_runs(runs: Sequence[Run], all_series: Sequence[Series], *, marked: bool = False) -> list[Line]:
    labels = _run_labels(runs)
    return [
        Line(label, series, place, place % 4, marked=marked)
        for place, (label, series) in enumerate(zip(labels, all_series, strict=True))
        if len(series)
    ]


def _module_lines(runs: Sequence[Run], modules: Sequence[str]) -> list[Line]:
    """One colour a module and one style a run; of one module alone, one colour a run."""
    lines = []
    for style, (run, run_label) in enumerate(zip(runs, _run_labels(runs), strict=True)):
        # Two modules of three runs are six lines: more than that is no picture.
        few = modules[: max(1, 6 // len(runs))] if len(runs) > 1 else modules
        present = [module for module in few if module in run.last_ranks()]
        ways = _ways(run)
        for module, label in zip(present, module_labels(present, run.modules()), strict=True):
            series = thinned(run.module_rank(module).until(run.step))
            alike = next(len(modules) for modules in ways.values() if module in modules)
            others = f" and {alike - 1} alike" if alike > 1 else ""
            name = f"{label}, {run_label}" if run_label else label + others
            colour = modules.index(module) if len(few) > 1 else style
            lines.append(Line(name, series, colour, style % 4))
    return lines


def _wide(lines: Sequence[Line]) -> bool:
    values = [value for line in lines for value in line.series.values]
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_FROM
