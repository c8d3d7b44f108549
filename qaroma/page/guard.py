"""Who may speak to the page: this machine, by the address that holds the token, from the page itself."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # no-referrer would make a form's Origin null
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what does not come from the page itself, before anything of it is read.

    The token stands in the path and not in a cookie, which a browser would send to every port of this machine.

    Args:
        app: what is guarded.
        token: the first part of every path.
        hosts: values of the header Host that are ours; another is a name that leads here from elsewhere.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        refused = self._refusal(scope["method"], scope["path"], Headers(scope=scope))

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer: ASGIApp = self._app if refused is None else PlainTextResponse(refused, 403)
        await answer(scope, receive, send_guarded)

    def _refusal(self, method: str, path: str, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self._hosts:
            return "refused: this page answers at 127.0.0.1 alone"
        if not secrets.compare_digest(path[1:].partition("/")[0].encode(), self._token.encode()):
            return "refused: open the address that 'qaroma page' printed, whole"
        changes = method not in ("GET", "HEAD")
        if origin != f"http://{host}" and (origin is not None or changes):
            return "refused: asked for by another page"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "refused: asked for by another page"
        return None
