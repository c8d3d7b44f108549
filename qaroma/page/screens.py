"""The screens, in the order in which a person meets them: data, model, plan, run, chat, export."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qsl

import anyio
import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from qaroma.config.words import duration, file_size, memory_size
from qaroma.errors import QaromaError
from qaroma.page.choices import FORMS, MEANINGS, TRIAL_STEPS, Choice
from qaroma.page.commands import Jobs, figures_of, shown
from qaroma.page.models import Machine, models_for
from qaroma.page.places import DEMO, LARGEST_UPLOAD, RUNS, UPLOADS, inside, receive, require_small
from qaroma.page.talk import Talk, chat_words
from qaroma.runs.directory import RunDirectory, find_adapter
from qaroma.runs.finding import list_runs, looks_like_run
from qaroma.runs.reading import Run, read_run

TEMPLATES = Path(__file__).parent / "templates"
# The report is drawn from what models and data say: it may show itself and do nothing.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox"
_LONGEST_TEXT = 2**18  # bytes of a message or a form
_LOOK_SECONDS, _LOOK_REST = 1.5, 20  # between two looks at a run: at least, and in times of what a look took
_EXPORTS = {
    "gguf": ("Ollama, LM Studio, llama.cpp", "one file that holds the whole model"),
    "padded": ("vLLM, SGLang", "a small adapter beside the model"),
    "merged": ("Anything else", "the whole model as an ordinary folder"),
}


class Screens:
    """Answers of the page.

    Args:
        machine: where runs train.
        closing: whether the server is about to end.
    """

    def __init__(self, machine: Machine, closing: Callable[[], bool]) -> None:
        self._machine, self._closing = machine, closing
        self._jobs, self._talk = Jobs(), Talk()

    def home(self, request: Request) -> Response:
        runs = [run for run in _runs() if "/" not in run.name]
        return _show("home", request, runs=runs, limit=LARGEST_UPLOAD // 2**20, demo=DEMO, uploads=UPLOADS.as_posix())

    async def upload(self, request: Request) -> Response:
        try:
            require_small(int(request.headers.get("content-length", 0)))
            name = await receive(request.query_params.get("name", ""), request.stream())
        except QaromaError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"data": name})

    def data(self, request: Request) -> Response:
        choice = Choice.read(request.query_params)
        words = choice.preview() if choice.form or choice.columns else None
        form = FORMS.get(choice.form or "")
        return _show("data", request, choice=choice, form=form, meanings=MEANINGS, words=words)

    def preview(self, request: Request) -> Response:
        return _fragment("preview", request, Choice.read(request.query_params).preview())

    def model(self, request: Request) -> Response:
        models = models_for(self._machine)
        here, fetched = ([one for one in models if one.here is here] for here in (True, False))
        choice = Choice.read(request.query_params)
        return _show("model", request, choice=choice, machine=self._machine, here=here, fetched=fetched)

    def plan(self, request: Request) -> Response:
        choice = Choice.read(request.query_params)
        data = choice.data.replace(":", "-").split(".")[0]
        run = RunDirectory.unused(f"{Path(choice.model).name}-{data}").path
        busy = [other.name for other in _runs() if other.state == "running"]
        words = {trial: choice.finetune(run, trial=trial) for trial in (False, True)}
        return _show("plan", request, choice=choice, run=run.name, words=words, busy=busy, trial=TRIAL_STEPS)

    def forecast(self, request: Request) -> Response:
        choice, run = Choice.read(request.query_params), _run(request)
        self._talk.end()  # what is free decides
        return _fragment("forecast", request, [*choice.finetune(run), "--dry-run"], choice=choice)

    def start(self, request: Request) -> Response:
        choice, run = Choice.read(request.query_params), _run(request)
        words = choice.finetune(run, trial="trial" in request.query_params)
        return self._begin(request, run.name, words, f"run/{run.name}")

    def run(self, request: Request) -> Response:
        run = _run(request)
        words = {"stopped": _resume(run), "finished": chat_words(run)}
        return _show("run", request, name=run.name, now=self._now(run.name), words=words)

    async def events(self, request: Request) -> Response:
        """How a run or an export stands, whenever that changes."""
        name = _run(request).name

        async def follow() -> AsyncIterator[str]:
            before = None
            while not self._closing():
                began = time.monotonic()
                now = await anyio.to_thread.run_sync(self._now, name)
                if now != before:
                    yield f"data: {json.dumps(now)}\n\n"
                before = now
                await anyio.sleep(max(_LOOK_SECONDS, _LOOK_REST * (time.monotonic() - began)))

        return StreamingResponse(follow(), media_type="text/event-stream")

    def report(self, request: Request) -> Response:
        page = _run(request) / "report.html"
        if page.is_symlink() or not page.is_file():
            raise QaromaError("the report appears with the first steps")
        return HTMLResponse(page.read_bytes(), headers={"Content-Security-Policy": _REPORT_POLICY})

    def stop(self, request: Request) -> Response:
        run = _run(request)
        self._jobs.stop(run)
        return _to(request, f"run/{run.name}")

    def resume(self, request: Request) -> Response:
        run = _run(request)
        return self._begin(request, run.name, _resume(run), f"run/{run.name}")

    def export(self, request: Request) -> Response:
        run = _run(request)
        exports = [(name, *texts, _export(run, name)) for name, texts in _EXPORTS.items()]
        return _show("export", request, name=run.name, now=self._now(f"{run.name}.export"), exports=exports)

    async def start_export(self, request: Request) -> Response:
        run = _run(request)
        form = dict(parse_qsl(await _text(request)))
        return self._begin(request, f"{run.name}.export", _export(run, form["format"]), f"run/{run.name}/export")

    def chat(self, request: Request) -> Response:
        run = _run(request)
        return _show("chat", request, name=run.name, words=chat_words(run))

    async def talk(self, request: Request) -> Response:
        """Without a message the model is loaded; with one it is answered, in lines of JSON as they come."""
        run, message = _run(request), await _text(request)
        return StreamingResponse(self._talk.answer(run, message), media_type="application/x-ndjson")

    def _begin(self, request: Request, job: str, words: list[str], place: str) -> Response:
        self._talk.end()  # its model would take the memory
        self._jobs.start(job, words)
        return _to(request, place)

    def _now(self, name: str) -> dict[str, Any]:
        """How a run stands, or another job."""
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


def _run(request: Request) -> Path:
    """The folder of the run that an address names, which may not be there yet."""
    return inside(RUNS, request.path_params.get("name") or request.query_params.get("run", ""))


def _runs() -> list[Run]:
    return list_runs(RUNS) if RUNS.is_dir() else []


def _progress(run: Run) -> dict[str, Any]:
    """How far a run is, in figures for people."""
    seconds, losses = run.series("seconds").values, run.series("loss").values
    left = (run.budget or run.step) - run.step
    return {
        "step": run.step,
        "steps": run.budget or 0,
        "loss": f"loss {losses[-1]:.3f} (lower is better)" if losses else "",
        "left": f"about {duration(median(seconds[-20:]) * left)} left" if len(seconds) > 1 and left else "",
    }


def _resume(run: Path) -> list[str]:
    return ["finetune", "--resume", "--output", run.as_posix()]


def _export(run: Path, name: str) -> list[str]:
    return ["export", run.as_posix(), "--format", name, *(["--outtype", "q8_0"] if name == "gguf" else [])]


async def _text(request: Request) -> str:
    """The body of a request that is no file."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _LONGEST_TEXT:
            raise QaromaError(f"got more than {_LONGEST_TEXT:,} bytes; make the message shorter")
    return body.decode("utf-8", "replace")


def _fragment(screen: str, request: Request, words: list[str], **values: Any) -> Response:
    """A piece of a screen from what a command says, or the command's error."""
    try:
        return _show(screen, request, figures=figures_of(words), **values)
    except QaromaError as error:
        return _show("failed", request, 400, error=str(error))


def failed(request: Request, error: Exception) -> Response:
    """An error as a screen."""
    return _show("error", request, 400, error=str(error))


def _to(request: Request, place: str) -> Response:
    return RedirectResponse(f"{_root(request)}{place}", 303)


def _root(request: Request) -> str:
    return f"/{request.url.path.split('/')[1]}/"


def _show(screen: str, request: Request, status: int = 200, **values: Any) -> Response:
    return HTMLResponse(_html().get_template(f"{screen}.html").render(root=_root(request), **values), status)


@cache
def _html() -> jinja2.Environment:
    html = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    html.filters.update(memory=memory_size, files=file_size, command=shown)
    return html
