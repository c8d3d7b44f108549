"""The page's addresses, and the server on 127.0.0.1 that answers them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from qaroma.errors import QaromaError
from qaroma.page.guard import Guard
from qaroma.page.models import Machine, this_machine
from qaroma.page.screens import TEMPLATES, Screens, failed

HOME = "127.0.0.1"


def make_app(token: str, port: int, machine: Machine) -> Guard:
    """The page as an ASGI application.

    Args:
        token: what every address begins with.
        port: that it is served at.
        machine: where runs train.
    """
    screens = Screens(machine)
    routes = [
        Route("/", screens.home),
        Route("/upload", screens.upload, methods=["PUT"]),
        Route("/data", screens.data),
        Route("/model", screens.model),
        Route("/plan", screens.plan),
        Route("/run/{name}", screens.run),
        Route("/run/{name}/report", screens.report),
        Route("/run/{name}/export", screens.export),
        Route("/run/{name}/chat", screens.chat),
        Route("/run/{name}/talk", screens.talk, methods=["POST"]),
        Route("/run/{name}/start", screens.start, methods=["POST"]),
        Route("/run/{name}/stop", screens.stop, methods=["POST"]),
        Route("/run/{name}/resume", screens.resume, methods=["POST"]),
        Route("/run/{name}/write/{form}", screens.write, methods=["POST"]),
        Mount("/static", StaticFiles(directory=TEMPLATES / "static")),
    ]
    refusals: Any = {QaromaError: failed, OSError: failed}
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=refusals)
    return Guard(app, token, frozenset({f"{HOME}:{port}", f"localhost:{port}"}))


def serve(port: int, tell: Callable[[str], None]) -> None:
    """Answer until Ctrl-C.

    Args:
        port: 0 takes one that is free.
        tell: called with the address, once it answers.

    Raises:
        QaromaError: the port is taken.
    """
    listening = socket.socket()
    try:
        listening.bind((HOME, port))
    except OSError as error:
        listening.close()
        raise QaromaError(f"port {port} is taken ({error.strerror}); leave --port out to take a free one") from error
    port = listening.getsockname()[1]
    token, machine = secrets.token_urlsafe(24), this_machine()
    listening.listen(128)  # what asks from now on is answered as soon as the server runs
    tell(f"http://{HOME}:{port}/{token}/")
    app = make_app(token, port, machine)
    # Addresses hold the token: none is logged.
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **options)).run(sockets=[listening])
