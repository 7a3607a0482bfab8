"""Who may speak to the page: checks before every request, and headers on every response."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names by which a browser on this machine calls it; others lead here only by a forged DNS answer."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI middleware. local: the server is bound to this machine alone, so its name must be one of `LOCAL`."""

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if problem := self._problem(Headers(scope=scope)):
            return await JSONResponse({"error": problem}, 403)(scope, receive, guarded)
        await self.app(scope, receive, guarded)

    def _problem(self, headers: Headers) -> str | None:
        """Return why another site's page must be behind this request, if one must."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and urlsplit(f"//{host}").hostname not in LOCAL:
            return f"This page answers to {LOCAL[0]} and {LOCAL[1]} only, not to {host!r}."
        if origin is not None and urlsplit(origin).netloc != host:
            return f"A page of {origin!r} may not use this one."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_visit(headers):
            return "A page of another site may not use this one."
        return None


def _is_visit(headers: Headers) -> bool:
    """Return whether somebody follows a link to here, which shows the page and gives the other site nothing."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
