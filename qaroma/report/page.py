"""One self-contained HTML page of one or several runs: no script, and no request of any kind.

The page states a content policy under which a browser would load nothing and run nothing, and all
text of models and data is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qaroma import __version__
from qaroma.config.words import shortened
from qaroma.report import drawings
from qaroma.report.keyfigures import description, evenly, key_figures, settings, state, validation_table
from qaroma.report.names import layer_grid
from qaroma.report.outcome import outcome
from qaroma.report.panels import Panel, choose_modules, growth_panels, training_panels
from qaroma.report.spectra import Spectra, component_similarity, read_spectra, similar_modules
from qaroma.report.style import has_matplotlib, inline_svg
from qaroma.runs.files import write_atomically
from qaroma.runs.finding import open_run
from qaroma.runs.reading import Run

PAGE = "report.html"
REFRESH_SECONDS = 20
_MOST_SAMPLES = 10  # steps shown of one prompt
_MOST_ANSWERS = 12
_LONGEST_SHOWN = 1500


def write_page(run: Path) -> Path:
    """Write ``report.html`` of one run, finished or not, into its directory.

    Made to be called at every validation: of a run that goes on, the page follows the run in an open
    browser and leaves out what takes a decomposition of the adapter; of a finished run it is whole.
    Without matplotlib it holds the numbers, tables and samples, and says how to get the figures. The
    file appears in one move.

    Args:
        run: a run directory.

    Returns:
        The page's path.

    Raises:
        QaromaError: no run there.
        OSError: the page cannot be written.
    """
    read = open_run(run)
    spectra = read_spectra(read) if read.finished else None
    page = Path(run) / PAGE
    write_atomically(page, build_page([read], [spectra], follow=not read.finished))
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
    columns = [_run_context(run, found, drawable) for run, found in zip(runs, spectra, strict=True)]
    sections = _sections(runs, spectra, modules, metric or runs[0].metric) if drawable else []
    names = list(dict.fromkeys(name for column in columns for name in column["figures"]))
    return _template().render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=columns,
        key_names=names,
        sections=sections,
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


def _run_context(run: Run, spectra: Spectra | None, drawable: bool) -> dict[str, Any]:
    """What the template shows of one run."""
    header, rows = validation_table(run)
    config = run.path / "config.yaml"
    return {
        "name": run.name,
        "description": description(run),
        "state": state(run),
        "finished": run.finished,
        "success": run.finished and outcome(run).success,
        "step": run.step,
        "budget": run.budget,
        "figures": key_figures(run, spectra),
        "settings": settings(run),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "validation_header": header,
        "validation_rows": rows,
        "samples": samples_over_time(run),
        "answers": answers_side_by_side(run),
        "rank_table": None if drawable else _rank_table(run),
    }


def _sections(
    runs: Sequence[Run], spectra: Sequence[Spectra | None], modules: Sequence[str] | None, metric: str
) -> list[dict[str, Any]]:
    """Headings, each with its figures as ``<svg>``."""
    chosen = choose_modules(runs[0]) if modules is None else modules
    growth = growth_panels(runs, chosen, metric)
    sections = [
        _section("Learning", _panels([p for p in growth if p.key == "metric"] + training_panels(runs))),
        _section("Growth", _panels([p for p in growth if p.key != "metric"])),
    ]
    for place, (run, found) in enumerate(zip(runs, spectra, strict=True)):
        maps = _rank_maps(run, found)
        drawn = [
            inline_svg(drawings.maps_figure({title: values}), f"map-{place}-{i}", f"{title} by layer and module")
            for i, (title, values) in enumerate(maps.items())
        ]
        sections.append(_section("Ranks" + _of(run, runs), drawn))
    sections.append(_section("Similarity of the components", _cosines(runs, spectra), _COSINE_NOTE, len(runs) > 1))
    return [section for section in sections if section["svgs"]]


_COSINE_NOTE = (
    "Cosine of every pair of components of a module: 0 where each one adds a direction of its own, "
    "1 or -1 where one repeats another."
)


def _section(title: str, svgs: Sequence[str], note: str = "", wide: bool = False) -> dict[str, Any]:
    return {"title": title, "svgs": [Markup(svg) for svg in svgs], "note": note, "wide": wide}


def _panels(panels: Sequence[Panel]) -> list[str]:
    return [inline_svg(drawings.panel_figure(p), f"panel-{p.key}", f"{p.title} against the step") for p in panels]


def _rank_maps(run: Run, spectra: Spectra | None) -> dict[str, Mapping[str, float]]:
    if spectra is not None and spectra.ratio is not None:
        return {"Rank": spectra.ranks, f"Effective rank ({100 * spectra.ratio:.1f} %)": spectra.effective}
    ranks = run.last_ranks()
    return {f"Rank at step {run.step:,}": ranks} if ranks else {}


def _cosines(runs: Sequence[Run], spectra: Sequence[Spectra | None]) -> list[str]:
    """One figure a module; with several runs, side by side in it."""
    found = [(run, s) for run, s in zip(runs, spectra, strict=True) if s is not None]
    svgs = []
    for place, module in enumerate(similar_modules([s for _, s in found])):
        similarity = {similarity_title(run): component_similarity(s, [module]) for run, s in found}
        figure = drawings.cosine_figure(similarity, found[0][0].modules() or list(found[0][1].ranks))
        svgs.append(inline_svg(figure, f"cosines-{place}", f"cosine similarity of the components of {module}"))
    return svgs


def similarity_title(run: Run) -> str:
    """A run's name with its reset, which is what the paper's Figure 4 compares."""
    reset = run.setting("growth.reset") if run.grows else None
    if reset is None:
        return run.name
    return f"{run.name}, {'without reset' if reset == 'none' else f'reset: {reset}'}"


def samples_over_time(run: Run) -> list[dict[str, Any]]:
    """Each prompt with its answers while training: ``{"prompt": ..., "answers": [(step, text), ...]}``."""
    by_prompt: dict[str, dict[int, str]] = {}
    for line in run.samples:
        for prompt, answer in zip(line["prompts"], line["answers"], strict=False):
            by_prompt.setdefault(prompt, {})[int(line["step"])] = shortened(answer, _LONGEST_SHOWN)
    return [
        {"prompt": prompt, "answers": [(step, answers[step]) for step in evenly(list(answers), _MOST_SAMPLES)]}
        for prompt, answers in by_prompt.items()
    ]


def answers_side_by_side(run: Run) -> list[dict[str, Any]]:
    """The generation test: prompt, expected answer, and the answers before and after training."""
    found: dict[str, dict[str, Any]] = {}
    for line in run.answers:
        for prompt, expected, answer in zip(line["prompts"], line["expected"], line["answers"], strict=False):
            row = found.setdefault(prompt, {"prompt": prompt, "expected": expected, "before": None, "after": None})
            row[line["when"]] = shortened(answer, _LONGEST_SHOWN)
    for row in found.values():
        row["right"] = row["after"] is not None and row["after"].strip() == row["expected"].strip()
    return list(found.values())[:_MOST_ANSWERS]


def _rank_table(run: Run) -> dict[str, Any] | None:
    """The ranks as an HTML table, for a page without figures."""
    ranks = run.last_ranks()
    if not ranks:
        return None
    grid = layer_grid(ranks)
    cells = [["-".join(f"{v:g}" for v in dict.fromkeys((min(c), max(c)))) if c else "" for c in r] for r in grid.cells]
    return {"columns": grid.columns, "rows": list(zip(grid.rows, cells, strict=True))}


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f" of {run.name}" if len(runs) > 1 else ""
