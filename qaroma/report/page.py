"""One self-contained HTML page of one or several runs: no script, and no request of any kind.

The page states a content policy under which a browser would load nothing and run nothing, and all
text of models and data is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qaroma import __version__
from qaroma.report import drawings
from qaroma.report.answers import answered_test, answered_while_training, first_answers
from qaroma.report.card_image import card_figure
from qaroma.report.finding import finding
from qaroma.report.keyfigures import description, key_figures, settings, state, validation_table, without_places
from qaroma.report.outcome import outcome
from qaroma.report.panels import Panel, choose_modules, growth_panels, learning_panel, training_panels
from qaroma.report.rank_map import RankMap, map_of_ranks, rank_map
from qaroma.report.spectra import Spectra, read_spectra
from qaroma.report.style import has_matplotlib, inline_svg, save
from qaroma.runs.files import write_atomically
from qaroma.runs.finding import open_run
from qaroma.runs.reading import Run

PAGE = "report.html"
CARD = "report.png"
REFRESH_SECONDS = 20
_MOST_ANSWERS = 12
_VERDICTS = {"running": "It is still training", "stopped": "It stopped before its end"}
_WIDE, _NARROW = (11.2, 3.1), (3.4, 2.7)  # inches of a figure; a phone shows the narrow one as large as it is


def write_page(run: Path, *, stopped: bool = False) -> Path:
    """Write ``report.html`` of one run, finished or not, into its directory; of a finished one ``report.png`` too.

    Made to be called at every validation: of a run that goes on, the page follows the run in an open
    browser and leaves out what takes a decomposition of the adapter; of a finished run it is whole.
    Without matplotlib it holds the numbers, tables and samples, and says how to get the figures. The
    file appears in one move.

    Args:
        run: a run directory.
        stopped: the process that has the run's lock is about to give it back, before the run's end.

    Returns:
        The page's path.

    Raises:
        QaromaError: no run there.
        OSError: the page cannot be written.
    """
    read = replace(open_run(run), state="stopped") if stopped else open_run(run)
    spectra = read_spectra(read) if read.finished else None
    page = Path(run) / PAGE
    write_atomically(page, build_page([read], [spectra], follow=not read.finished))
    if read.finished and has_matplotlib():
        save(card_figure(read), Path(run) / CARD)
    return page


def build_page(
    runs: Sequence[Run],
    spectra: Sequence[Spectra | None],
    *,
    modules: Sequence[str] | None = None,
    metric: str | None = None,
    follow: bool = False,
) -> str:
    """The page as text.

    Args:
        runs: one, or several to compare.
        spectra: of each run's adapter; None where there is none, or where it is left out.
        modules: full names of the modules whose rank is shown; None chooses them.
        metric: validation metric in the figure of growth; None is the first run's main one.
        follow: whether an open browser reloads the page.
    """
    drawable = has_matplotlib()
    columns = [_run_context(run, found) for run, found in zip(runs, spectra, strict=True)]
    one = len(runs) == 1
    figures = _figures(runs, choose_modules(runs[0]) if modules is None else modules, metric) if drawable else {}
    return _template().render(
        title=f"{runs[0].name}: {columns[0]['finding'].headline}" if one else f"{len(runs)} runs compared",
        runs=columns,
        key_names=list(dict.fromkeys(name for column in columns for name in column["figures"])),
        curve=_curve(runs[0]) if one and drawable else None,
        figures=figures,
        drawable=drawable,
        refresh=REFRESH_SECONDS if follow else None,
        version=__version__,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qaroma.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _run_context(run: Run, spectra: Spectra | None) -> dict[str, Any]:
    """What the template shows of one run."""
    header, rows = validation_table(run)
    config = run.path / "config.yaml"
    ended = outcome(run) if run.finished else None
    tested = answered_test(run)
    command = ended.command if ended else run.resume
    return {
        "name": run.name,
        "description": description(run),
        "finding": finding(run),
        "state": state(run),
        "command": without_places(command, run) if command else None,
        "finished": run.finished,
        "running": run.state == "running",
        "verdict": ended.verdict if ended else _VERDICTS.get(run.state, "It is broken"),
        "success": ended is not None and ended.success,
        "step": run.step,
        "budget": run.budget,
        "first_answers": first_answers(run),
        "rank_map": map_of_ranks(run),
        "effective_map": _effective_map(spectra),
        "figures": key_figures(run, spectra),
        "settings": settings(run),
        "config": without_places(config.read_text(encoding="utf-8"), run) if config.is_file() else "",
        "validation_header": header,
        "validation_rows": rows,
        "samples": answered_while_training(run),
        "answers": tested[:_MOST_ANSWERS],
        "answers_in_all": len(tested),
    }


def _effective_map(spectra: Spectra | None) -> RankMap | None:
    if spectra is None or spectra.ratio is None:
        return None
    return rank_map(spectra.effective, "Effective rank", max(spectra.ranks.values()))


def _curve(run: Run) -> dict[str, Any] | None:
    """How the run learned, drawn for a screen and for a phone: the same figure could not be read on both."""
    panel = learning_panel(run)
    if not panel.lines:
        return None
    drawn = {name: Markup(_drawn(panel, size, f"{name}-")) for name, size in (("wide", _WIDE), ("narrow", _NARROW))}
    return {"title": panel.title, **drawn}


def _figures(runs: Sequence[Run], modules: Sequence[str], metric: str | None) -> dict[str, list[dict[str, Any]]]:
    """Headings, each with its titled figures; what never changes is a key figure, and none of these."""
    growth, one = growth_panels(runs, modules, metric or runs[0].metric), len(runs) == 1
    judged = [panel for panel in growth if panel.key == "metric" and not (one and metric in (None, runs[0].metric))]
    groups = {"Training": [*judged, *training_panels(runs)], "Growth": [p for p in growth if p.key != "metric"]}
    drawn = {
        name: [{"title": p.title, "svg": Markup(_drawn(p, _NARROW))} for p in panels if not p.flat]
        for name, panels in groups.items()
    }
    return {name: found for name, found in drawn.items() if found}


def _drawn(panel: Panel, size: tuple[float, float], prefix: str = "") -> str:
    return inline_svg(drawings.panel_figure(panel, size), f"{prefix}{panel.key}", panel.finding)
