"""The numbers of a run, as words: key figures, settings, validations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from qaroma.report.reading import LOWER_IS_BETTER, Run, Series
from qaroma.report.spectra import Spectra

ENDINGS = {
    "grown": "every module has the rank it needs",
    "budget": "the step budget is spent",
    "patience": "validation no longer improved",
}
_SETTINGS = {
    "Base model": ("model.name",),
    "Quantisation": ("model.quantization",),
    "Target modules": ("growth.target_modules",),
    "Rank": ("rank",),
    "Inner rank": ("growth.inner_rank",),
    "Alpha": ("growth.alpha",),
    "Inner loop, at most": ("growth.t_in",),
    "Check every": ("growth.check_every",),
    "eps_in, eps_out": ("growth.eps_in", "growth.eps_out"),
    "Outer criterion": ("growth.outer_criterion",),
    "Initial A": ("growth.init",),
    "Reset": ("growth.reset",),
    "Schedule": ("growth.schedule",),
    "Learning rate": ("training.learning_rate",),
    "Micro-batch x accumulation": ("training.micro_batch", "training.grad_accum"),
    "Longest example": ("data.max_length",),
    "Seed": ("training.seed",),
}
_OF_GROWTH = ("growth.t_in", "growth.check_every", "growth.eps_in", "growth.outer_criterion", "growth.init",
              "growth.reset", "growth.schedule", "growth.inner_rank")  # fmt: skip


def state(run: Run) -> str:
    """Where a run stands, as one sentence."""
    if not run.finished:
        return f"Not finished: step {run.step:,}" + (f" of {run.budget:,}" if run.budget else "")
    why = ENDINGS.get(str(run.summary.get("ended")))
    return f"Finished after {run.step:,} steps" + (f": {why}" if why else "")


def description(run: Run) -> str:
    """What was trained on what, as one sentence."""
    model = Path(str(run.setting("model.name") or "a model")).name
    sources = [Path(str(source.get("path", ""))).name for source in run.setting("data.train") or []]
    data = ", ".join(source for source in sources if source)
    task = "" if run.task == "causal-lm" else f", {run.task}"
    return f"{run.method_name} on {model}{f', trained on {data}' if data else ''}{task}"


def key_figures(run: Run, spectra: Spectra | None = None) -> dict[str, str]:
    """Name -> value of what one wants to know first; what was not measured is left out.

    Args:
        run: As read.
        spectra: Of its adapter, for the effective rank.
    """
    found: dict[str, str] = {}
    metric = run.main_metric()
    for name in dict.fromkeys(("loss", metric)):
        best = best_validation(run, name)
        if best is not None:
            found[f"Best validation {name}"] = f"{best[1]:.4g} at step {best[0]:,}"
    scores = {line.get("when"): line["exact_match"] for line in run.answers if "exact_match" in line}
    if scores:
        found["Exact match"] = ", ".join(f"{100 * score:.1f} % {when}" for when, score in scores.items())
    ranks = list((spectra.ranks if spectra else run.last_ranks()).values())
    if ranks:
        spread = f"{sum(ranks) / len(ranks):.2f} on average, {min(ranks)} to {max(ranks)}"
        found["Rank"] = spread if min(ranks) < max(ranks) else f"{ranks[0]} in every module"
    if spectra and spectra.ratio is not None:
        mean = sum(spectra.effective.values()) / len(spectra.effective)
        found["Effective rank"] = f"{mean:.2f} on average, {100 * spectra.ratio:.1f} % of the rank"
    found.update(_cost(run))
    return found


def _cost(run: Run) -> dict[str, str]:
    found = {}
    trainable = run.series("trainable_parameters").values
    if trainable:
        mean, last = sum(trainable) / len(trainable), "at the end" if run.finished else "now"
        course = f"{trainable[0]:,.0f} at first, {mean:,.0f} on average, {trainable[-1]:,.0f} {last}"
        found["Trainable parameters"] = course if len(set(trainable)) > 1 else f"{mean:,.0f} throughout"
    # A run that was interrupted has in its summary the seconds of its last command alone.
    seconds = max(run.summary.get("seconds") or 0.0, sum(run.series("seconds").values))
    if seconds:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        found["Time"] = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
    speed, memory = run.series("tokens_per_second").values, run.series("memory_bytes").values
    if speed:
        found["Speed"] = f"{median(speed):,.0f} tokens a second"
    if memory:
        found["Most memory"] = f"{max(memory) / 2**30:.2f} GiB"
    return found


def best_validation(run: Run, metric: str) -> tuple[int, float] | None:
    """Step and value of the best validation after the first step; None where there was none."""
    series = run.validation(metric)
    points = [point for point in zip(series.steps, series.values, strict=True) if point[0] > 0]
    if not points:
        return None
    better = min if metric in LOWER_IS_BETTER else max
    return better(points, key=lambda point: point[1])


def settings(run: Run) -> dict[str, str]:
    """Name -> value of the settings that matter to the run's method, as resolved."""
    growing = run.method in ("aroma", "relora")
    found = {}
    for name, keys in _SETTINGS.items():
        if (keys == ("rank",) and growing) or (keys[0] in _OF_GROWTH and not growing):
            continue
        values = [run.setting(key) for key in keys]
        if all(value is not None for value in values):
            found[name] = (" x " if " x " in name else ", ").join(_shown(value) for value in values)
    return found


def validation_table(run: Run, most: int = 25) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the validations, at most ``most`` of them, evenly chosen, the last included."""
    metrics = run.metrics()
    columns: list[dict[int, float]] = [_by_step(run.validation(metric)) for metric in metrics]
    chosen = evenly([int(line["step"]) for line in run.validations], most)
    rows = [[f"{step:,}", *(f"{c[step]:.4g}" if step in c else "" for c in columns)] for step in chosen]
    return ["step", *metrics], rows


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _by_step(series: Series) -> dict[int, float]:
    return dict(zip(series.steps, series.values, strict=True))


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
