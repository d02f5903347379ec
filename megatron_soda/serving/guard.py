"""What every request passes: who may ask, how much may be sent, and what the page may load."""

# pyright: reportMissingImports=false

from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_UPLOAD = 32 << 20  # bytes of a request
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HEADERS = {
    # The page is one file and asks nobody but this server.
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def problem(message: str, status: int = 400) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


class Guard:
    """Refuses requests that a page of another site sends through the user's browser; on loopback also those under a
    foreign name, which such a site may have given this address (DNS rebinding)."""

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        if wrong := self._foreign(Request(scope)):
            return await problem(wrong, 403)(scope, receive, with_headers)
        await self._app(scope, receive, with_headers)

    def _foreign(self, request: Request) -> str | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        try:
            name, came_from = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError:
            return "the Host or Origin header is not an address"
        if self._local and name not in LOOPBACK:
            return f"this server is for its own machine; it is not called {host}"
        if origin is not None and came_from != host:
            return f"pages of {origin} may not use this server"
        return None


async def limited(request: Request) -> Request:
    """The request with its whole body read. Raises HTTPException 413 as soon as that is over MOST_UPLOAD."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_UPLOAD:
            raise HTTPException(413, f"the request is over {MOST_UPLOAD >> 20} MB")
    sent: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Any:
        return sent.pop() if sent else await request.receive()

    return Request(request.scope, again)
