"""The server's routes: the page, and OpenAI's paths for speech and transcriptions."""

# pyright: reportMissingImports=false

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..audio.judge import CUT
from ..errors import SodaError
from ..inference.own import Answer
from ..inference.studio import Studio
from ..log import log
from . import fields
from .answers import Work
from .formats import TYPES, Stream
from .guard import Guard, limited, problem
from .work import Busy, Gone, Worker

Events = AsyncIterator[Any]
Handler = Callable[[Request], Awaitable[Response]]


def build_app(studio: Studio, local: bool = True) -> Starlette:
    """local: only for requests to a name of this machine itself."""
    server = _Server(studio)
    routes = [
        Route("/", server.page),
        Route("/v1/models", server.models),
        Route("/v1/audio/speech", server.speech, methods=["POST"]),
        Route("/v1/audio/transcriptions", server.transcription, methods=["POST"]),
        Route("/v1/audio/continuations", server.continuation, methods=["POST"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.worker.close()

    refusals: dict[Any, Any] = {HTTPException: _refused, SodaError: _wrong, Busy: _busy, Gone: _gone}
    refusals |= {ClientDisconnect: _gone, Exception: _failed}
    guard = Middleware(Guard, local=local)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=refusals, lifespan=lifespan)


async def _refused(request: Request, error: Any) -> Response:
    return problem(error.detail, error.status_code)


async def _wrong(request: Request, error: Exception) -> Response:
    return problem(str(error))


async def _busy(request: Request, error: Exception) -> Response:
    return problem("too many requests are waiting; try again later", 503)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    return problem("the server failed; its log says why", 500)


class _Server:
    def __init__(self, studio: Studio) -> None:
        self.worker = Worker()
        self._studio = studio
        self._page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page)

    async def models(self, request: Request) -> Response:
        studio = self._studio
        limits = {"sample_rate": studio.codec.sample_rate, "most_seconds": studio.fitting / studio.frame_rate}
        made = {"id": studio.model.name, "object": "model", "created": 0, "owned_by": "megatron_soda"}
        return JSONResponse({"object": "list", "data": [{**made, **limits}]})

    async def transcription(self, request: Request) -> Response:
        request = await limited(request)
        async with request.form(max_files=1, max_fields=20, max_part_size=1 << 16) as form:
            work, format, stream = await fields.transcription(form)
        events = self._events(request, work)
        if stream:
            return await _streamed(events, _text_event, "text/event-stream")
        found = [event async for event in events][-1]
        assert isinstance(found, Answer)
        if format == "text":
            return PlainTextResponse(f"{found.texts[0]}\n")
        return JSONResponse({"text": found.texts[0], "ended_by_itself": found.ended_by_itself})

    async def speech(self, request: Request) -> Response:
        request = await limited(request)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise SodaError(f"the request is not JSON ({error})") from None
        work, sound = fields.speech(body)
        return await self._aloud(request, work, sound)

    async def continuation(self, request: Request) -> Response:
        request = await limited(request)
        async with request.form(max_files=1, max_fields=20, max_part_size=1 << 16) as form:
            work, sound = await fields.continuation(form)
        return await self._aloud(request, work, sound)

    async def _aloud(self, request: Request, work: Work, sound: fields.SoundOut) -> Response:
        rate = self._studio.codec.sample_rate
        headers = {"X-Sample-Rate": str(rate)}
        events = self._events(request, work)
        if sound.events:
            return await _streamed(
                events, partial(_sound_event, Stream(sound.format, rate)), "text/event-stream", headers
            )
        return await _streamed(events, partial(_sound_bytes, Stream(sound.format, rate)), TYPES[sound.format], headers)

    def _events(self, request: Request, work: Work) -> Events:
        job = self.worker.start(lambda job: work(self._studio, job))
        return job.events(request.is_disconnected)


async def _streamed(
    events: Events, encode: Callable[[Any], bytes], kind: str, headers: dict[str, str] | None = None
) -> Response:
    """Waits for the first event, so that what is wrong with the request gets its status."""
    first = await anext(events)

    async def parts() -> AsyncIterator[bytes]:
        try:
            yield encode(first)
            async for event in events:
                yield encode(event)
        except (Gone, SodaError) as error:
            log.info(f"a request ended early: {error or 'the client hung up'}")
        finally:
            await events.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    return StreamingResponse(parts(), media_type=kind, headers=headers)


def _event(kind: str, **values: Any) -> bytes:
    return f"data: {json.dumps({'type': kind, **values})}\n\n".encode()


def _text_event(event: str | Answer) -> bytes:
    if isinstance(event, Answer):
        _warn(event)
        return _event("transcript.text.done", text=event.texts[0], ended_by_itself=event.ended_by_itself)
    return _event("transcript.text.delta", delta=event)


def _sound_event(stream: Stream, event: np.ndarray | Answer) -> bytes:
    if not isinstance(event, Answer):
        return _event("speech.audio.delta", audio=base64.b64encode(stream.push(event)).decode())
    _warn(event)
    rest = _event("speech.audio.delta", audio=base64.b64encode(stream.finish()).decode())
    return rest + _event("speech.audio.done", ended_by_itself=event.ended_by_itself)


def _sound_bytes(stream: Stream, event: np.ndarray | Answer) -> bytes:
    if not isinstance(event, Answer):
        return stream.push(event)
    _warn(event)
    return stream.finish()


def _warn(found: Answer) -> None:
    if not found.ended_by_itself:
        log.warning(f"an answer was {CUT}; the model did not end it by itself")
