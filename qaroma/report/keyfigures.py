"""The numbers of a run, as words: key figures, settings, validations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from statistics import median

from qaroma.config.metrics import METRICS, metric_facts, metrics_of
from qaroma.config.tasks import PREFERENCE
from qaroma.config.words import duration, memory_size
from qaroma.report.answers import evenly
from qaroma.report.outcome import outcome
from qaroma.report.spectra import Spectra
from qaroma.runs.figures import Figures, figures_of, validation_of
from qaroma.runs.reading import Run

_SETTINGS = {
    "Base model": ("model.name",),
    "Quantisation": ("model.quantization",),
    "Target modules": ("growth.target_modules",),
    "Rank": ("rank",),
    "Inner rank": ("growth.inner_rank",),
    "Rank at first, at most": ("growth.start_rank", "growth.max_rank"),
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
              "growth.reset", "growth.schedule", "growth.inner_rank", "growth.start_rank")  # fmt: skip


def state(run: Run) -> str:
    """Where a run stands, as one sentence."""
    if not run.finished:
        return f"Not finished: step {run.step:,}" + (f" of {run.budget:,}" if run.budget else "")
    return f"Finished after {run.step:,} steps: {outcome(run).text}"


def description(run: Run) -> str:
    """What was trained on what, as one sentence."""
    model = Path(str(run.setting("model.name") or "a model")).name
    data = ", ".join(Path(source).name for source in run.sources())
    task = "" if run.task == "causal-lm" else f", {run.task}"
    return f"{run.method_title} on {model}{f', trained on {data}' if data else ''}{task}"


def key_figures(run: Run, spectra: Spectra | None = None) -> dict[str, str]:
    """Name -> value of what one wants to know first; what was not measured is left out.

    Args:
        run: as read.
        spectra: of its adapter, for the effective rank.
    """
    found: dict[str, str] = {}
    figures = figures_of(run)
    of_pairs = metrics_of(run.task) if run.task == PREFERENCE else ()
    for name in dict.fromkeys(("loss", run.metric, *of_pairs)):
        measured = validation_of(run, name)
        if measured is not None and measured.best_step:
            best = metric_facts(name).text(measured.best)
            found[f"Validation {name}"] = f"{best} at step {measured.best_step:,}"
    scores = {"before": figures.exact_match_before, "after": figures.exact_match}
    exact = [f"{METRICS['exact_match'].text(score)} {when}" for when, score in scores.items() if score is not None]
    if exact:
        found["Exact match"] = ", ".join(exact)
    found.update(_ranks(run, figures))
    if spectra and spectra.ratio is not None:
        found["Effective rank"] = f"{spectra.mean_effective:.2f} on average, {100 * spectra.ratio:.1f} % of the rank"
    found.update(_cost(run, figures))
    return found


def _ranks(run: Run, figures: Figures) -> dict[str, str]:
    """Those of the best adapter; before there is one, those of now."""
    if figures.rank_min is None:
        return {}
    name = "Rank of the best adapter" if run.adapter_ranks() else "Rank"
    even = figures.rank_min == figures.rank_max
    spread = f"{figures.rank_mean:.2f} on average, {figures.rank_min} to {figures.rank_max}"
    return {name: f"{figures.rank_min} in every module" if even else spread}


def _cost(run: Run, figures: Figures) -> dict[str, str]:
    found = {}
    if figures.trainable_mean is not None:
        mean, last = f"{figures.trainable_mean:,.0f}", "at the end" if run.finished else "now"
        course = f"{figures.trainable_start:,} at first, {mean} on average, {figures.trainable_end:,} {last}"
        changed = len(set(run.series("trainable_parameters").values)) > 1
        found["Trainable parameters"] = course if changed else f"{mean} throughout"
        if figures.adapter_parameters is not None:
            found["Trainable parameters"] += f"; {figures.adapter_parameters:,} in the adapter"
    if figures.seconds:
        found["Time"] = duration(figures.seconds)
    if run.device is not None:
        found["Device"] = "CPU" if run.device == "cpu" else run.device
    speed = run.series("tokens_per_second").values
    if speed:
        found["Speed"] = f"{median(speed):,.0f} tokens a second"
    if figures.memory_bytes is not None:
        found["Most memory"] = memory_size(figures.memory_bytes)
    return found


def settings(run: Run) -> dict[str, str]:
    """Name -> value of the settings that matter to the run's method, as resolved."""
    growing = run.grows
    found = {}
    for name, keys in _SETTINGS.items():
        if (keys == ("rank",) and growing) or (keys[0] in _OF_GROWTH and not growing):
            continue
        values = [run.setting(key) for key in keys]
        if all(value is not None for value in values):
            text = (" x " if " x " in name else ", ").join(_shown(value) for value in values)
            found[name] = without_places(text, run)
    return found


def without_places(text: str, run: Run) -> str:
    """A text that can be sent to others: of the absolute paths of a run only their last names are left.

    Args:
        text: its configuration, or a command.
        run: whose paths they are: its own and those of its configuration.
    """
    paths = {path for value in (run.path.as_posix(), *_texts(run.config)) if (path := _absolute(value))}
    for path in sorted(paths, key=lambda path: -len(str(path))):  # one may lie within another
        in_lines = r"\s+".join(map(re.escape, str(path).split(" ")))  # YAML breaks long lines at spaces
        text = path.name.join(re.split(rf"{in_lines}(?![\w.-])", text))
    return text


def _texts(value: object) -> Iterator[str]:
    """The texts within settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _absolute(text: str) -> PurePath | None:
    """A path that begins at a root, of whatever system; the root itself is none."""
    kinds = (PurePosixPath(text), PureWindowsPath(text))
    return next((path for path in kinds if path.is_absolute() and path.name), None)


def validation_table(run: Run, most: int = 25) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the validations, at most ``most`` of them, evenly chosen, the last included.

    The last row is that of the adapter, where trimming has changed its figures.
    """
    metrics = run.metrics()
    columns = {name: dict(run.validation(name).points) for name in metrics}
    measured = {
        int(line["step"]): {name: columns[name].get(line["step"]) for name in metrics} for line in run.validations
    }
    shown: list[tuple[str, Mapping[str, float | None]]]
    shown = [(f"{step:,}", measured[step]) for step in evenly(list(measured), most)]
    info = run.adapter
    logged = measured.get(info.step or 0, {}) if info and info.validation else {}
    if info and any(info.validation.get(name) != value for name, value in logged.items()):
        shown.append((f"{info.step:,}, trimmed", info.validation))
    texts = {name: metric_facts(name).text for name in metrics}
    rows = [
        [when, *("" if (value := found.get(name)) is None else text(value) for name, text in texts.items())]
        for when, found in shown
    ]
    return ["step", *metrics], rows


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
