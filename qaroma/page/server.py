"""The page's addresses, and the server on 127.0.0.1 that answers them."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from qaroma.errors import QaromaError
from qaroma.page.commands import EXPORTS
from qaroma.page.guard import guarded
from qaroma.page.models import Machine, this_machine
from qaroma.page.screens import TEMPLATES, Screens, failed

HOME = "127.0.0.1"
BUTTONS = ("start", "stop", "resume", *EXPORTS)


def make_app(token: str, port: int, machine: Machine) -> ASGIApp:
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
        Route("/run/{name}/chat", screens.chat),
        Route("/run/{name}/talk", screens.talk, methods=["POST"]),
        *(Route(f"/run/{{name}}/{button}", partial(screens.press, button), methods=["POST"]) for button in BUTTONS),
        Mount("/static", StaticFiles(directory=TEMPLATES / "static")),
    ]
    refusals: Any = {QaromaError: failed, OSError: failed}
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=refusals)
    return guarded(app, token, frozenset({f"{HOME}:{port}", f"localhost:{port}"}))


def serve(port: int, tell: Callable[[str], None]) -> None:
    """Answer until Ctrl-C.

    Args:
        port: 0 takes one that is free.
        tell: called with the address, once it answers.

    Raises:
        QaromaError: the port is taken, or not this user's to take.
    """
    try:
        listening = socket.create_server((HOME, port))
    except OSError as error:
        raise QaromaError(f"port {port}: {os.strerror(error.errno or 0)}; leave --port out for a free one") from error
    port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
    app = make_app(token, port, this_machine())
    tell(f"http://{HOME}:{port}/{token}/")
    # Addresses hold the token: none is logged.
    quiet = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5)
    uvicorn.Server(quiet).run(sockets=[listening])
