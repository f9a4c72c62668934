"""What clients talk to: checks keys and sizes, hands requests to replicas, and asks another one where a replica dies."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flamingo_export.deploy.ray.asgi import Head, scope_of
from flamingo_export.deploy.ray.replay import DONE, Diverged, Replay
from flamingo_export.deploy.ray.requests import passed
from flamingo_export.deploy.ray.settings import RaySettings
from flamingo_export.serve.access import Access, read_keys
from flamingo_export.serve.held import Held, counted, declared
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.transport import ClientGone, read_body

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_BODY_SECONDS = 30.0
_READY_SECONDS = 5.0
_PAUSE = 0.2
"""Seconds before a request is asked again: Ray notices meanwhile that the replica is gone."""
_UNCHANGED = frozenset({"content-type", "accept", "x-request-id"})
"""Headers that replicas see."""
_OPEN = frozenset({"/", "/health/live", "/health/ready", "/openapi.json", "/api"})
_log = logging.getLogger("flamingo_export.serve")


class Lost(Exception):
    """The replica that had the request is gone."""


class Overloaded(Exception):
    """So many requests wait for replicas that no more are taken."""


Ask = Callable[[dict[str, Any], bytes, str], AsyncIterator[Head | bytes]]
"""Asks some replica: scope, body, key. Raises Lost or Overloaded."""


class Ingress:
    """One per application; it holds no model and little state, so that it may be replaced at any time."""

    def __init__(self, ask: Ask, settings: RaySettings) -> None:
        self._ask, self._settings = ask, settings
        keys = read_keys(Path(settings.api_key_file)) if settings.api_key_file is not None else {}
        self._access = Access(keys, None)
        self._held = Held(settings.limits)

    async def respond(self, request: Request) -> Response:
        """The answer to a client. Its body is held until the answer is out, since it may be asked of another replica."""
        with ExitStack() as holding:
            answer = await self._respond(request, holding)
            if isinstance(answer, _Stream):
                answer.holding = holding.pop_all()
            return answer

    async def _respond(self, request: Request, holding: ExitStack) -> Response:
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        path = request.url.path
        try:
            if path == "/health/live":
                return JSONResponse({"status": "live"})
            if path == "/metrics":
                raise ApiError(404, "Replicas' metrics are Ray's: see docs/scaling.md.", code="not_found")
            address = request.client.host if request.client is not None else ""
            given = request.headers.get("authorization")
            caller = address if path in _OPEN else self._access.caller(given, address)
            size = declared(request.headers)
            if size is not None:
                request = Request(request.scope, counted(request.receive, holding.enter_context(self._held.body(size))))
            body = await read_body(request, most=self._settings.max_body, seconds=_BODY_SECONDS)
            headers = [
                (name, value) for name, value in request.headers.items() if name in _UNCHANGED and name != "x-request-id"
            ]
            scope = scope_of(request.method, path, request.url.query.encode(), [*headers, ("x-request-id", request_id)], caller)
            if path == "/health/ready":
                async with asyncio.timeout(_READY_SECONDS):
                    return await self._whole(scope, b"", "")
            on = passed(path, body)
            del body  # what is held is the replica's form of it
            answer = self._streamed if on.streams else self._whole
            return await answer(scope, on.body, on.key)
        except ApiError as error:
            return _refused(error, request_id)
        except Overloaded:
            return _refused(ApiError(429, "Too many requests wait already.", code="queue_full", retry=True), request_id)
        except (Lost, TimeoutError):
            return _refused(ApiError(503, "No replica could answer. Try again.", code="unavailable", retry=True), request_id)
        except ClientGone:
            return Response(status_code=499)

    async def _whole(self, scope: dict[str, Any], body: bytes, key: str) -> Response:
        """An answer that goes out once it is complete, so that a second try costs nothing but time."""
        for attempt in range(self._settings.retries + 1):
            pieces: list[Head | bytes] = []
            try:
                async for piece in self._ask(scope, body, key):
                    pieces.append(piece)
                return _response(pieces)
            except Lost:
                await self._again(attempt, scope)
        raise Lost

    async def _streamed(self, scope: dict[str, Any], body: bytes, key: str) -> Response:
        """The head decides: a refusal is a whole answer, a stream goes out as it comes."""
        for attempt in range(self._settings.retries + 1):
            pieces = self._ask(scope, body, key)
            try:
                head = await anext(pieces)
                assert isinstance(head, tuple)
                status, headers = head
                if status != 200 or not dict(headers).get("content-type", "").startswith("text/event-stream"):
                    return _response([head, *[piece async for piece in pieces]])
                return _Stream(self._events(pieces, scope, body, key, attempt), status_code=status, headers=_headers(headers))
            except (Lost, StopAsyncIteration):
                await self._again(attempt, scope)
        raise Lost

    async def _events(
        self, pieces: AsyncIterator[Head | bytes], scope: dict[str, Any], body: bytes, key: str, attempt: int
    ) -> AsyncIterator[bytes]:
        replay = Replay()
        while True:
            try:
                async for piece in pieces:
                    if isinstance(piece, bytes):
                        for event in replay.push(piece):
                            yield event
                if replay.finished:
                    return
                raise Lost  # it ended too soon
            except Diverged:
                yield _failed("The replica died, and another one continues differently. Ask again.")
                return
            except Lost:
                try:
                    await self._again(attempt, scope)
                except Lost:
                    yield _failed("The replica died, and no other could take over. Ask again.")
                    return
                attempt += 1
                replay.begin()
                pieces = self._ask(scope, body, key)
            except Overloaded:
                yield _failed("The replica died, and the others have no room. Ask again.")
                return

    async def _again(self, attempt: int, scope: dict[str, Any]) -> None:
        """Before another try. Raises Lost where there were enough."""
        _log.warning("a replica was lost at %s, try %d", scope["path"], attempt + 1)
        if attempt >= self._settings.retries:
            raise Lost
        await asyncio.sleep(_PAUSE * (attempt + 1))


class _Stream(StreamingResponse):
    """A stream that lets go of what it holds once it is out, or its reader has gone."""

    holding: ExitStack | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.holding is not None:
                self.holding.close()


def _response(pieces: list[Head | bytes]) -> Response:
    if not pieces:
        raise Lost
    head, *parts = pieces
    assert isinstance(head, tuple)
    status, headers = head
    body = b"".join(part for part in parts if isinstance(part, bytes))
    return Response(body, status_code=status, headers=_headers(headers))


def _headers(headers: list[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in ("content-length", "transfer-encoding", "connection")}


def _refused(error: ApiError, request_id: str) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers={**error.headers, "x-request-id": request_id})


def _failed(text: str) -> bytes:
    body = ApiError(503, text, code="replica_lost").body()
    return b"data: " + msgspec.json.encode(body) + b"\n\n" + DONE
