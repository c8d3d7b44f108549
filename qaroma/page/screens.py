"""The screens, in the order in which a person meets them: data, model, plan, run, chat."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from qaroma.config.words import duration, memory_size
from qaroma.errors import QaromaError
from qaroma.page.choices import DEMO, FORMS, MEANINGS, Choice
from qaroma.page.commands import EXPORTS, Jobs, answer_of, of_run, shown
from qaroma.page.models import Machine, models_for
from qaroma.page.places import LARGEST_UPLOAD, RUNS, UPLOADS, inside, receive
from qaroma.page.talk import Talk
from qaroma.runs.directory import RunDirectory, find_adapter
from qaroma.runs.finding import list_runs, looks_like_run
from qaroma.runs.reading import Run, read_run

TEMPLATES = Path(__file__).parent / "templates"
# The report is drawn from what models and data say: it may show itself and do nothing.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox"
_HTML = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
_HTML.filters.update(memory=memory_size, duration=duration, command=shown)
_HTML.globals.update(demo=DEMO, forms=FORMS, meanings=MEANINGS, exports=EXPORTS, limit=LARGEST_UPLOAD, uploads=UPLOADS)


class Screens:
    """Answers of the page.

    Args:
        machine: where runs train.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._jobs, self._talk = Jobs(), Talk()

    def home(self, request: Request) -> Response:
        return _show("home", request, runs=[run for run in _runs() if "/" not in run.name])

    async def upload(self, request: Request) -> Response:
        try:
            name = await receive(request.query_params.get("name", ""), request.stream())
        except QaromaError as error:
            return PlainTextResponse(str(error), 400)
        return PlainTextResponse(f"data?{urlencode({'data': name})}")

    def data(self, request: Request) -> Response:
        choice = Choice.read(request.query_params)
        return _show("data", request, choice.preview(), choice=choice)

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
        path = _run(request)
        run = read_run(path) if looks_like_run(path) else Run(path, path.name, "broken")
        state = "starting" if self._jobs.working(run.name) and run.state != "running" else run.state
        tuned = find_adapter(path) is not None
        next_ones = {"stopped": ["resume"], "finished": ["chat"]}.get(state, [])
        lines = [of_run(path)[button] for button in (*next_ones, *(EXPORTS if tuned and next_ones else ()))]
        report = path / "report.html"  # it has something to say once there is an adapter
        drawn = report.stat().st_mtime_ns if tuned and report.is_file() else 0
        return _show("run", request, lines=lines, run=run, state=state, tuned=tuned, drawn=drawn, jobs=self._jobs)

    def report(self, request: Request) -> Response:
        page = inside(_run(request), "report.html")
        return HTMLResponse(page.read_bytes(), headers={"Content-Security-Policy": _REPORT_POLICY})

    def press(self, button: str, request: Request) -> Response:
        """A button of a run: its command begins, or the one at work is asked to stop."""
        run = _run(request)
        if button == "stop":
            self._jobs.stop(run)
        else:
            words = Choice.read(request.query_params).finetune(run) if button == "start" else of_run(run)[button]
            self._talk.end()  # its model would take the memory
            self._jobs.start(f"{run.name}.export" if button in EXPORTS else run.name, words)
        return RedirectResponse(f"../{run.name}", 303)

    def chat(self, request: Request) -> Response:
        run = _run(request)
        return _show("chat", request, lines=[of_run(run)["chat"]], name=run.name)

    async def talk(self, request: Request) -> Response:
        """Without a message the model is loaded; with one it is answered, in lines of JSON as they come."""
        message = (await request.body()).decode("utf-8", "replace")
        return StreamingResponse(self._talk.answer(_run(request), message), media_type="application/x-ndjson")


def _run(request: Request) -> Path:
    """The folder of the run that an address names, which may not be there yet."""
    return inside(RUNS, request.path_params["name"])


def _runs() -> list[Run]:
    return list_runs(RUNS) if RUNS.is_dir() else []


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
    root = f"/{request.url.path.split('/')[1]}/"
    values |= {"screen": screen, "root": root, "lines": lines, "answer": partial(answer_of, asked or [])}
    page = _HTML.get_template("base.html")
    return StreamingResponse(page.generate(values) if asked else [page.render(values)], status, media_type="text/html")
