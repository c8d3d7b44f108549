"""Who may speak to the page: this machine, by the address that holds the token, from the page itself."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-src 'self'; img-src data:; form-action 'self'; base-uri 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # no-referrer would make a form's Origin null
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def guarded(app: ASGIApp, token: str, hosts: frozenset[str]) -> ASGIApp:
    """An application that refuses what does not come from the page itself, before anything of it is read.

    The token stands in the path and not in a cookie, which a browser would send to every port of this machine.

    Args:
        app: what is guarded; it has no websockets.
        token: the first part of every path.
        hosts: values of the header Host that are ours; another is a name that leads here from elsewhere.
    """

    def refusal(scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        host, origin, site = (headers.get(name) for name in ("host", "origin", "sec-fetch-site"))
        if host not in hosts:
            return "this page answers at 127.0.0.1 alone"
        if not secrets.compare_digest(scope["path"][1:].partition("/")[0].encode(), token.encode()):
            return "open the address that 'qaroma page' printed, whole"
        unnamed = origin is None and scope["method"] in ("GET", "HEAD")  # where nothing changes
        if not (unnamed or origin == f"http://{host}") or site not in (None, "none", "same-origin"):
            return "asked for by another page"
        return None

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = refusal(scope) if scope["type"] == "http" else None
        answering = app if refused is None else PlainTextResponse(f"refused: {refused}", 403)
        await answering(scope, receive, send_guarded)

    return answer
