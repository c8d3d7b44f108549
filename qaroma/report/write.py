"""``qaroma report``: figures and a page of runs, as files in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qaroma.errors import QaromaError
from qaroma.report import drawings
from qaroma.report.card_image import card_figure
from qaroma.report.page import CARD, PAGE, build_page
from qaroma.report.panels import choose_modules, growth_panels, training_panels
from qaroma.report.spectra import Spectra, component_similarity, read_spectra, similar_modules
from qaroma.report.style import need_matplotlib, save
from qaroma.runs.files import write_atomically
from qaroma.runs.finding import open_runs
from qaroma.runs.reading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "html")


@dataclass
class Report:
    """What was written.

    Args:
        files: in the order of writing.
        ratios: run -> mean rank, mean effective rank and their ratio, of runs with an adapter.
        missing: what could not be drawn, as sentences.
    """

    files: list[Path] = field(default_factory=list)
    ratios: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def write_report(
    paths: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    formats: Sequence[str] = FORMATS,
    modules: Sequence[str] = (),
    metric: str | None = None,
) -> Report:
    """Draw what one or several runs have to show, and write it.

    Args:
        paths: run directories, finished or not, of any method and task.
        output: folder for the files; None is ``RUN/report`` of one run and ``report`` of several.
        formats: of ``png``, ``svg`` (the figures) and ``html`` (the page).
        modules: names, or endings of names, of the modules whose rank and components are shown; none chooses them.
        metric: validation metric of the first figure; None is the task's own.

    Raises:
        QaromaError: no run there, no such module or metric, or figures without matplotlib.
    """
    runs = open_runs(paths)
    drawn = [fmt for fmt in formats if fmt != "html"]
    if drawn:
        need_matplotlib()
    _check_metric(runs, metric)
    chosen = _matching(runs, modules) if modules else choose_modules(runs[0])
    spectra = [read_spectra(run) for run in runs]
    report = Report(ratios=_ratios(runs, spectra))
    folder = Path(output) if output else (runs[0].path / "report" if len(runs) == 1 else Path("report"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if drawn:
            found = _figures(runs, spectra, chosen, metric or runs[0].metric, bool(modules), report.missing)
            for name, figure in found.items():
                for fmt in drawn:
                    report.files.append(folder / f"{name}.{fmt}")
                    save(figure, report.files[-1])
            if len(runs) == 1 and runs[0].steps and "png" in drawn:
                report.files.append(folder / CARD)
                save(card_figure(runs[0]), report.files[-1])
        if "html" in formats:
            report.files.append(folder / PAGE)
            page = build_page(runs, spectra, modules=chosen, metric=metric)
            write_atomically(report.files[-1], page)
    except OSError as error:
        raise QaromaError(f"cannot write to {folder} ({error.strerror}); choose another --output") from error
    return report


def _figures(
    runs: Sequence[Run],
    spectra: Sequence[Spectra | None],
    modules: Sequence[str],
    metric: str,
    only_these: bool,
    missing: list[str],
) -> dict[str, Figure]:
    """File name -> figure; what cannot be drawn is told in ``missing``."""
    found = {}
    for name, panels in (("growth", growth_panels(runs, modules, metric)), ("training", training_panels(runs))):
        if panels:
            found[name] = drawings.panels_figure(panels)
        else:
            missing.append(f"{name}: no step has been logged yet")
    measured = [(run, s) for run, s in zip(runs, spectra, strict=True) if s is not None and s.ranks]
    for run, s in measured:
        name = "ranks" if len(runs) == 1 else f"ranks-{re.sub(r'[^A-Za-z0-9._-]+', '-', run.name)}"
        found[name] = drawings.rank_figure(s)
    missing += [
        f"ranks of {run.name}: it has no adapter yet" for run, s in zip(runs, spectra, strict=True) if s is None
    ]
    compared = list(modules) if only_these else similar_modules([s for _, s in measured])
    similarity = {_similarity_title(run): component_similarity(s, compared) for run, s in measured}
    if any(similarity.values()):
        found["cosines"] = drawings.cosine_figure(similarity, list(measured[0][1].ranks))
    elif measured:
        missing.append("cosines: no module has two components")
    return found


def _similarity_title(run: Run) -> str:
    """A run's name with its reset, which is what the paper's Figure 4 compares."""
    reset = run.setting("growth.reset") if run.grows else None
    if reset is None:
        return run.name
    return f"{run.name}, {'without reset' if reset == 'none' else f'reset: {reset}'}"


def _ratios(runs: Sequence[Run], spectra: Sequence[Spectra | None]) -> dict[str, tuple[float, float, float]]:
    found = {}
    for run, s in zip(runs, spectra, strict=True):
        if s is not None and s.ratio is not None:
            found[run.name] = (s.mean_rank, s.mean_effective, s.ratio)
    return found


def _check_metric(runs: Sequence[Run], metric: str | None) -> None:
    known = sorted({name for run in runs for name in run.metrics()})
    if metric is not None and metric not in known:
        raise QaromaError(
            f"got --metric {metric}; no validation measured it; expected one of: {', '.join(known) or 'none yet'}"
        )


def _matching(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """Full names of the modules that the given names or endings mean."""
    known = list(dict.fromkeys(module for run in runs for module in run.modules()))
    found: list[str] = []
    for ending in wanted:
        fitting = [module for module in known if f".{module}".endswith(f".{ending}")]
        if not fitting:
            example = f", for instance {known[0]}" if known else ""
            raise QaromaError(f"got --module {ending}; no module of these runs ends so; expected a name{example}")
        found += [module for module in fitting if module not in found]
    return found
