"""The server of `vpt app`: three static files, and an interface of JSON in and JSON lines out.

Every call but those that begin has the visitor's secret in a header, which no other site's page can send; nothing
secret stands in an address. Pictures and answers are held in memory until their visitor leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import uvicorn
from anyio import CapacityLimiter, fail_after, move_on_after, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from vpt_model.app.page.guard import Guard
from vpt_model.app.page.line import Full, Job, Line, Message
from vpt_model.app.page.pictures import Picture, drawn, uploaded
from vpt_model.app.page.sessions import Limits, Refused, Session, Sessions, Turn
from vpt_model.app.page.turns import Answerer, Asked
from vpt_model.app.seen import COLOURS, sights
from vpt_model.config import ENCODERS
from vpt_model.text.tokens import GRID

STATIC = Path(__file__).parent / "static"
SECRET = "x-vpt-session"
_JSON_BYTES = 64 << 10
_POLL, _SWEEP = 0.2, 15.0


class Page:
    """The application around one model. name: what the page calls it. mini: whether it is vpt-mini."""

    def __init__(self, answerer: Answerer, name: str, mini: bool, local: bool, limits: Limits | None = None) -> None:
        self.answerer, self.name, self.mini = answerer, name, mini
        self.limits = limits or Limits()
        self.sessions, self.line = Sessions(self.limits), Line(self.limits.waiting)
        # Decoding and drawing beside the model; two at once leave it room.
        self._drawing = CapacityLimiter(2)
        routes = [
            Route("/", lambda request: FileResponse(STATIC / "index.html")),
            Route("/api/about", self.about),
            Route("/api/session", self.begin, methods=["POST"]),
            Route("/api/session", self.end, methods=["DELETE"]),
            Route("/api/pictures", self.upload, methods=["POST"]),
            Route("/api/examples", self.example, methods=["POST"]),
            Route("/api/turns", self.ask, methods=["POST"]),
            Route("/api/turns/{id}/compare", self.compare, methods=["POST"]),
            Route("/api/turns/{id}/picture.png", self.picture),
            Route("/api/stop", self.stop, methods=["POST"]),
            Route("/api/branches/{number:int}", self.close_branch, methods=["DELETE"]),
            Route("/api/branches/{number:int}/undo", self.undo, methods=["POST"]),
            Route("/api/branches/{number:int}/fork", self.fork, methods=["POST"]),
            Route("/api/branches/{number:int}/answers.json", self.answers),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        handlers: dict[Any, Any] = {Refused: _refused, HTTPException: _failed, ClientDisconnect: _left}
        guard = [Middleware(Guard, local=local)]
        self.app = Starlette(routes=routes, middleware=guard, exception_handlers=handlers, lifespan=self._life)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            for session in self.sessions:
                self.sessions.end(session)
            await to_thread.run_sync(self.line.close)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP, self.limits.idle))
            for session in self.sessions.expired():
                self.sessions.end(session)

    def _session(self, request: Request) -> Session:
        return self.sessions.get(request.headers.get(SECRET, ""))

    async def about(self, request: Request) -> Response:
        """Return what the page needs to know before anybody has done anything."""
        model, limits = self.answerer.engine.model, self.limits
        kind = next((name for name, kind in ENCODERS.items() if kind == model.config.kind), None)
        regions = self.answerer.engine.ids.region_start is not None
        known = {"name": self.name, "mini": self.mini, "device": str(model.device), "regions": regions}
        known |= {"dtype": str(model.dtype).removeprefix("torch."), "reencoder": kind, "grid": GRID, "stages": COLOURS}
        taken = {"upload": limits.upload, "pixels": limits.pixels, "question": limits.question, "idle": limits.idle}
        return JSONResponse(known | {"limits": taken | {"tokens": limits.tokens, "seconds": limits.seconds}})

    async def begin(self, request: Request) -> Response:
        session = self.sessions.new()
        return JSONResponse({"session": session.id, "branch": 1}, 201)

    async def end(self, request: Request) -> Response:
        session = self._session(request)
        if session.job is not None:
            self.line.stop(session.job)
        self.sessions.end(session)
        return Response(status_code=204)

    async def upload(self, request: Request) -> Response:
        session, limits = self._session(request), self.limits
        try:
            with fail_after(limits.upload_seconds):
                limit = f"The file is larger than {limits.upload >> 20} MB: make the picture smaller and try again."
                data = await _body(request, limits.upload, limit)
        except TimeoutError:
            raise Refused(408, "The upload took too long: try again, or make the picture smaller.") from None
        return await self._show(session, partial(uploaded, data, limits.pixels))

    async def example(self, request: Request) -> Response:
        session, asked = self._session(request), await _json(request)
        seed = asked.get("seed")
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 1 << 31):
            raise Refused(422, f"The number of an example must be 0 … {(1 << 31) - 1}.")
        return await self._show(session, partial(drawn, seed))

    async def _show(self, session: Session, make: Callable[[], Picture]) -> Response:
        try:
            picture = await to_thread.run_sync(make, limiter=self._drawing)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        if session.ended:
            raise Refused(410, "This session has ended.")
        self.sessions.add(session, picture)
        return JSONResponse(await to_thread.run_sync(picture.as_json, limiter=self._drawing), 201)

    async def ask(self, request: Request) -> Response:
        session, asked = self._session(request), await _json(request)
        question, picture, looks = asked.get("question"), asked.get("picture"), asked.get("looks")
        if not isinstance(question, str) or not question.strip():
            raise Refused(422, "Ask something first: the question is empty.")
        if len(question) > self.limits.question:
            raise Refused(422, f"The question has {len(question)} characters, the limit is {self.limits.question}.")
        if looks is not None and not (isinstance(looks, list) and all(isinstance(look, str) for look in looks)):
            raise Refused(422, "The looks must be a list of texts, or null.")
        tokens = asked.get("tokens", 64)
        if not isinstance(tokens, int) or not 1 <= tokens <= self.limits.tokens:
            raise Refused(422, f"An answer may have 1 to {self.limits.tokens} tokens.")
        shown = None if picture is None else session.picture(str(picture))
        number = asked.get("branch", 1)
        if not isinstance(number, int):
            raise Refused(422, "The conversation must be a number.")
        branch = session.branch(number)
        if len(branch.turns) >= self.limits.turns:
            raise Refused(409, f"This conversation has {self.limits.turns} questions, the limit: begin a new one.")
        wanted = Asked(question.strip(), shown, looks or None, bool(asked.get("remember", True)), tokens)
        return self._run(session, lambda job: self.answerer.answer(job, branch, wanted))

    async def compare(self, request: Request) -> Response:
        session = self._session(request)
        turn = session.turn(request.path_params["id"])
        if turn.picture is None:
            raise Refused(422, "This question was about no picture: there is no look to leave out.")
        return self._run(session, lambda job: self.answerer.compare(job, turn, self.limits.tokens))

    def _run(self, session: Session, work: Callable[[Job], None]) -> Response:
        session.idle()

        def finished() -> None:
            session.job = None
            if session.ended:
                session.release()

        session.job = job = Job(work, self.limits.seconds, finished)
        try:
            self.line.put(job)
        except Full:
            session.job = None
            raise Refused(503, f"{self.limits.waiting} questions wait already: try again in a minute.") from None
        return StreamingResponse(self._messages(job), media_type="application/x-ndjson")

    async def _messages(self, job: Job) -> AsyncIterator[str]:
        """Yield what a job tells, as lines, first its place in the queue. Who stops reading stops the job."""
        place, quiet = None, 0.0
        try:
            while True:
                if place != 0 and (ahead := self.line.ahead(job)) != place:
                    place, quiet = ahead, 0.0
                    if place:
                        yield _line({"event": "queued", "ahead": place})
                with move_on_after(_POLL) as poll:
                    message = await job.outbox.get()
                if poll.cancelled_caught:
                    quiet += _POLL
                    if quiet > 5:  # a connection that has died is noticed by writing to it
                        quiet = 0.0
                        yield _line({"event": "alive"})
                    continue
                if message is None:
                    return
                if callable(message):
                    message = await to_thread.run_sync(message, limiter=self._drawing)
                yield _line(message)
        finally:
            self.line.stop(job)

    async def stop(self, request: Request) -> Response:
        job = self._session(request).job
        if job is not None:
            self.line.stop(job)
        return JSONResponse({"stopped": job is not None})

    async def undo(self, request: Request) -> Response:
        session = self._session(request)
        session.idle()
        branch = session.branch(request.path_params["number"])
        branch.undo()
        return JSONResponse({"turns": [turn.id for turn in branch.turns]})

    async def fork(self, request: Request) -> Response:
        session = self._session(request)
        session.idle()
        return JSONResponse({"branch": session.fork(request.path_params["number"], self.limits.branches)}, 201)

    async def close_branch(self, request: Request) -> Response:
        session = self._session(request)
        session.idle()
        session.close(request.path_params["number"])
        return JSONResponse({"branches": list(session.branches)})

    async def answers(self, request: Request) -> Response:
        """Return a conversation as its visitor keeps it."""
        branch = self._session(request).branch(request.path_params["number"])
        model = {"model": self.name, "device": str(self.answerer.engine.model.device)}
        return JSONResponse(model | {"turns": [turn.as_json() for turn in branch.turns]})

    async def picture(self, request: Request) -> Response:
        turn = self._session(request).turn(request.path_params["id"])
        if turn.picture is None:
            raise Refused(422, "This question was about no picture: there is nothing to draw.")
        data = await to_thread.run_sync(partial(self._drawn, turn, turn.picture), limiter=self._drawing)
        return Response(data, media_type="image/png")

    def _drawn(self, turn: Turn, picture: Picture) -> bytes:
        from vpt_model.app import figure  # matplotlib takes a second

        engine, out = self.answerer.engine, BytesIO()
        shown = sights(engine.model, engine.policy, picture.pixels, turn.answer, turn.scores)
        figure.draw_answer(picture.pixels.numpy(), turn.question, turn.answer, shown, out)
        return out.getvalue()


def _line(message: Message) -> str:
    return json.dumps(message) + "\n"


async def _body(request: Request, limit: int, problem: str) -> bytes:
    """Return the whole body of a request. Raises `Refused` as soon as it is larger than `limit` bytes, before all of it
    is here.
    """
    if int(request.headers.get("content-length", 0)) > limit:
        raise Refused(413, problem)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise Refused(413, problem)
    return bytes(data)


async def _json(request: Request) -> dict[str, Any]:
    data = await _body(request, _JSON_BYTES, f"The request is larger than {_JSON_BYTES >> 10} KB.")
    try:
        asked = json.loads(data or b"{}")
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise Refused(422, "The request is not a JSON object.")
    return asked


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"error": error.message}, error.status)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


def bind(host: str, port: int) -> tuple[socket.socket, bool]:
    """Return a listening socket, and whether this machine alone can reach it. Raises ValueError where it cannot be
    had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}, port {port}, cannot be used ({error}): give another --host or --port") from error
    return bound, ipaddress.ip_address(address[0]).is_loopback


def serve(page: Page, bound: socket.socket) -> None:
    """Serve until Ctrl-C. Only failures are logged: questions and pictures are their visitors' own."""
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    uvicorn.Server(uvicorn.Config(page.app, **quiet, timeout_graceful_shutdown=3)).run(sockets=[bound])
