"""The screens, in the order in which a person meets them: data, model, plan, run, chat, export."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from qaroma.config.words import duration, file_size, memory_size
from qaroma.errors import QaromaError
from qaroma.page.choices import DEMO, FORMS, MEANINGS, Choice
from qaroma.page.commands import Jobs, answer_of, shown
from qaroma.page.models import Machine, models_for
from qaroma.page.places import LARGEST_UPLOAD, RUNS, UPLOADS, inside, receive
from qaroma.page.talk import Talk, chat_words
from qaroma.runs.directory import RunDirectory, find_adapter
from qaroma.runs.finding import list_runs, looks_like_run
from qaroma.runs.reading import Run, read_run

TEMPLATES = Path(__file__).parent / "templates"
# The report is drawn from what models and data say: it may show itself and do nothing.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox"
_EXPORTS = {
    "gguf": ("Ollama, LM Studio, llama.cpp", "one file that holds the whole model"),
    "padded": ("vLLM, SGLang", "a small adapter beside the model"),
    "merged": ("Anything else", "the whole model as an ordinary folder"),
}


class Screens:
    """Answers of the page.

    Args:
        machine: where runs train.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._jobs, self._talk = Jobs(), Talk()

    def home(self, request: Request) -> Response:
        runs = [run for run in _runs() if "/" not in run.name]
        return _show("home", request, runs=runs, limit=LARGEST_UPLOAD, demo=DEMO, uploads=UPLOADS.as_posix())

    async def upload(self, request: Request) -> Response:
        try:
            name = await receive(request.query_params.get("name", ""), request.stream())
        except QaromaError as error:
            return PlainTextResponse(str(error), 400)
        return PlainTextResponse(f"data?{urlencode({'data': name})}")

    def data(self, request: Request) -> Response:
        choice = Choice.read(request.query_params)
        return _show("data", request, choice.preview(), choice=choice, forms=FORMS, meanings=MEANINGS)

    def model(self, request: Request) -> Response:
        choice, models = Choice.read(request.query_params), models_for(self._machine)
        return _show("model", request, choice=choice, machine=self._machine, models=models)

    def plan(self, request: Request) -> Response:
        choice = Choice.read(request.query_params)
        self._talk.end()  # what is free decides
        run = RunDirectory.unused(f"{Path(choice.model).name}-{choice.data.replace(':', '-').split('.')[0]}").path
        busy = [other.name for other in _runs() if other.state == "running"]
        words = choice.finetune(run)
        return _show("plan", request, [*words, "--dry-run"], [words], choice=choice, run=run.name, busy=busy)

    def run(self, request: Request) -> Response:
        run = _run(request)
        now = self._now(run.name)
        line = {"stopped": _resume(run), "finished": chat_words(run)}.get(now["state"])
        return _show("run", request, lines=[line] if line else [], name=run.name, now=now)

    def report(self, request: Request) -> Response:
        page = _run(request) / "report.html"
        if page.is_symlink() or not page.is_file():
            raise QaromaError("the report appears with the first steps")
        return HTMLResponse(page.read_bytes(), headers={"Content-Security-Policy": _REPORT_POLICY})

    def export(self, request: Request) -> Response:
        run = _run(request)
        now, lines = self._now(f"{run.name}.export"), [_export(run, form) for form in _EXPORTS]
        return _show("export", request, lines=lines, name=run.name, now=now, exports=_EXPORTS)

    def start(self, request: Request) -> Response:
        run = _run(request)
        return self._begin(request, run.name, Choice.read(request.query_params).finetune(run), f"run/{run.name}")

    def resume(self, request: Request) -> Response:
        run = _run(request)
        return self._begin(request, run.name, _resume(run), f"run/{run.name}")

    def write(self, request: Request) -> Response:
        run, form = _run(request), request.path_params["form"]
        if form not in _EXPORTS:
            raise QaromaError(f"got the form '{form}'; expected one of {', '.join(_EXPORTS)}")
        return self._begin(request, f"{run.name}.export", _export(run, form), f"run/{run.name}/export")

    def stop(self, request: Request) -> Response:
        run = _run(request)
        self._jobs.stop(run)
        return _to(request, f"run/{run.name}")

    def _begin(self, request: Request, job: str, words: list[str], place: str) -> Response:
        self._talk.end()  # its model would take the memory
        self._jobs.start(job, words)
        return _to(request, place)

    def chat(self, request: Request) -> Response:
        run = _run(request)
        return _show("chat", request, lines=[chat_words(run)], name=run.name)

    async def talk(self, request: Request) -> Response:
        """Without a message the model is loaded; with one it is answered, in lines of JSON as they come."""
        message = (await request.body()).decode("utf-8", "replace")
        return StreamingResponse(self._talk.answer(_run(request), message), media_type="application/x-ndjson")

    def _now(self, name: str) -> dict[str, Any]:
        """How a run stands, or an export."""
        path, working, failure = inside(RUNS, name), self._jobs.working(name), self._jobs.failure(name)
        run = read_run(path) if looks_like_run(path) else None
        state: str = run.state if run else "failed" if failure else "ended"
        report = path / "report.html"
        return {
            "state": "starting" if working and state != "running" else state,
            "said": self._jobs.said(name),
            "failure": failure or (run and run.problem),
            "report": report.stat().st_mtime_ns if report.is_file() else 0,
            "tuned": run is not None and find_adapter(path) is not None,
            **_progress(run or Run(path, name)),
        }


def _progress(run: Run) -> dict[str, Any]:
    """How far a run is, in figures for people."""
    seconds, losses = run.series("seconds").values, run.series("loss").values
    left = (run.budget or run.step) - run.step
    words = [f"loss {losses[-1]:.3f} (lower is better)"] if losses else []
    words += [f"about {duration(median(seconds[-20:]) * left)} left"] if len(seconds) > 1 and left else []
    return {"step": run.step, "steps": run.budget or 0, "words": words}


def _run(request: Request) -> Path:
    """The folder of the run that an address names, which may not be there yet."""
    return inside(RUNS, request.path_params["name"])


def _runs() -> list[Run]:
    return list_runs(RUNS) if RUNS.is_dir() else []


def _resume(run: Path) -> list[str]:
    return ["finetune", "--resume", "--output", run.as_posix()]


def _export(run: Path, form: str) -> list[str]:
    return ["export", run.as_posix(), "--format", form, *(["--outtype", "q8_0"] if form == "gguf" else [])]


def failed(request: Request, error: Exception) -> Response:
    """An error as a screen."""
    return _show("error", request, status=400, error=str(error))


def _show(
    screen: str, request: Request, asked: list[str] | None = None, lines: list[list[str]] | None = None,
    status: int = 200, **values: Any,
) -> Response:  # fmt: skip
    """A screen with the command lines of its buttons; of one that is asked, what stands before its answer is sent while
    the command works."""
    lines = lines or ([asked] if asked else [])
    values |= {"root": _root(request), "lines": lines, "answer": partial(answer_of, asked or [])}
    template = _html().get_template(f"{screen}.html")
    pieces = template.generate(values) if asked else [template.render(values)]
    return StreamingResponse(pieces, status, media_type="text/html")


def _to(request: Request, place: str) -> Response:
    return RedirectResponse(f"{_root(request)}{place}", 303)


def _root(request: Request) -> str:
    return f"/{request.url.path.split('/')[1]}/"


@cache
def _html() -> jinja2.Environment:
    html = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    html.filters.update(memory=memory_size, files=file_size, command=shown)
    return html
