"""The server as an ASGI application: paths to routes, and what every request has in common."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from flamingo_export.bundle.identity import bundle_digest, precision_of
from flamingo_export.errors import BackendLost, FlamingoExportError, NoMemory
from flamingo_export.runtime.timings import Timings
from flamingo_export.serve import routes
from flamingo_export.serve.access import Access
from flamingo_export.serve.bodies import Chat, Completion, Scored, parse
from flamingo_export.serve.call import Call
from flamingo_export.serve.held import Held, counted, declared
from flamingo_export.serve.metrics import Metrics
from flamingo_export.serve.models import Models, Served
from flamingo_export.serve.refusals import ApiError, refusal_of
from flamingo_export.serve.remote_media import MediaFetcher
from flamingo_export.serve.settings import ServeSettings
from flamingo_export.serve.tracing import Tracing
from flamingo_export.serve.transport import ClientGone, read_body

T = TypeVar("T")
_PREPARING = 4
"""Requests whose media are fetched and decoded at once; the others wait, and no more memory is taken."""
_CLOSED_REQUEST = 499
_log = logging.getLogger("flamingo_export.serve")


def fetcher_of(settings: ServeSettings) -> MediaFetcher:
    """What fetches media. Raises InputError for origins that are none."""
    return MediaFetcher(settings.allow_media_from, most=settings.media_bytes, seconds=settings.media_seconds)


class Server:
    """What the requests of a process share."""

    def __init__(
        self, models: Models, settings: ServeSettings, *, fetcher: MediaFetcher | None = None, tracing: Tracing | None = None
    ) -> None:
        """fetcher: of media; one by the settings, unless a test brings its own. tracing: none by default."""
        self.tracing = tracing or Tracing()
        self.models, self.settings = models, settings
        self.access = Access(settings.keys, settings.max_per_caller)
        self.held = Held(settings.limits)
        self.fetcher = fetcher or fetcher_of(settings)
        self.metrics = Metrics(models)
        self.draining = False
        self.active = 0
        """Requests under way."""
        self._preparing = asyncio.Semaphore(_PREPARING)
        self._prepared: Counter[Served] = Counter()
        """Requests of each model whose media are fetched and decoded, or wait for it."""

    async def prepared(self, served: Served, work: Callable[[], T], cancel: Callable[[T], None]) -> T:
        """Runs what fetches, decodes and submits in a worker thread. Raises ApiError 429 first if the engine's queue is full.

        cancel: of what was submitted after the caller had gone. A thread cannot be stopped, so it keeps its turn until it has ended.
        """
        stats, preparing = served.model.engine.stats(), self._prepared[served]
        # Those whose images are decoded, or wait for that, come to the engine soon: its queue is theirs.
        if stats.running + stats.waiting + preparing >= stats.rows + self.settings.max_queue:
            raise ApiError(429, f"{stats.waiting + preparing} requests wait already.", code="queue_full", retry=True)
        self._prepared[served] += 1
        try:
            await self._preparing.acquire()
        except BaseException:
            self._let_go(served)
            raise
        working = asyncio.ensure_future(asyncio.to_thread(work))
        working.add_done_callback(lambda _: self._end_preparing(served))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            working.add_done_callback(lambda done: _undone(done, cancel))
            raise

    def _end_preparing(self, served: Served) -> None:
        self._preparing.release()
        self._let_go(served)

    def _let_go(self, served: Served) -> None:
        """A request's preparation is over."""
        self._prepared[served] -= 1
        if not self._prepared[served]:
            del self._prepared[served]

    def observe(self, served: Served, timings: Timings) -> None:
        """Counts a finished request's times."""
        self.tracing.phases(timings)
        self.metrics.first_token.labels(served.name).observe(timings.first_token)
        between = self.metrics.between_tokens.labels(served.name)
        for step in timings.steps:
            between.observe(step)

    def refusal(self, served: Served, request_id: str, error: FlamingoExportError) -> ApiError:
        """What a client is answered for an error of ours. The log has the reason where the client does not read it."""
        refused = refusal_of(error)
        if refused is None:
            return self.fault(served, request_id, error)
        if isinstance(error, (BackendLost, NoMemory)):
            _log.error("%s", error, extra={"request_id": request_id, "model": served.name})
        return refused

    def fault(self, served: Served, request_id: str, error: BaseException) -> ApiError:
        """What a client reads of a failure that is not its own. The log has the rest."""
        served.failed()
        _log.error("request failed", exc_info=error, extra={"request_id": request_id, "model": served.name})
        return ApiError(500, f"The model failed on this request ({request_id}).", code="model_failure")


def _undone(done: asyncio.Future[T], cancel: Callable[[T], None]) -> None:
    """Gives up what work brought that nobody waits for any more."""
    if not done.cancelled() and done.exception() is None:
        cancel(done.result())


def create_app(server: Server) -> Starlette:
    """The application. Its lifespan closes the models."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.models.close)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _posted(server, Chat, routes.chat), methods=["POST"]),
            Route("/v1/completions", _posted(server, Completion, routes.completions), methods=["POST"]),
            Route("/v1/score", _posted(server, Scored, routes.score), methods=["POST"]),
            Route("/v1/models", _read(server, _models), methods=["GET"]),
            Route("/v1/models/{name:path}", _read(server, _model), methods=["GET"]),
            Route("/metrics", _read(server, _metrics), methods=["GET"]),
            Route("/health/live", _live, methods=["GET"]),
            Route("/health/ready", _ready, methods=["GET"]),
            Route("/openapi.json", _openapi, methods=["GET"]),
            Route("/api", _api, methods=["GET"]),
            Route("/", _page, methods=["GET"]),
        ],
        exception_handlers={404: _not_found, 405: _not_found},
        lifespan=lifespan,
    )
    app.state.server = server
    return app


def _posted(
    server: Server, kind: type[Any], route: Callable[[Call, Any], Awaitable[Any]]
) -> Callable[[Request], Awaitable[Any]]:
    async def endpoint(request: Request) -> Any:
        started = time.perf_counter()
        request_id = _request_id(request)
        caller, status, model = "", 200, ""
        closing = ExitStack()
        path = request.url.path
        span, streams = server.tracing.begin("POST", path, request.headers, request_id), False
        closing.callback(lambda: server.metrics.duration.labels(path).observe(time.perf_counter() - started))
        try:
            if server.draining:
                raise ApiError(503, "The server is stopping.", code="draining", retry=True)
            caller = _caller(server, request)
            closing.enter_context(server.access.turn(caller))
            _count_active(server, closing)
            counting = counted(request.receive, closing.enter_context(server.held.body(declared(request.headers) or 0)))
            body = await read_body(
                Request(request.scope, counting), most=server.settings.max_body, seconds=server.settings.body_seconds
            )
            parsed = parse(body, kind)
            model = parsed.model
            served = server.models.find(model)
            closing.enter_context(served.used())
            _log_prompt(server, request_id, body)
            call = Call(
                server=server, served=served, caller=caller, request_id=request_id, receive=request.receive, closing=closing
            )
            answer = await route(call, parsed)
            if not callable(answer):
                closing.close()
                answer = _json(answer, {"x-request-id": request_id})
            else:
                streams = True
                closing.callback(lambda: server.tracing.end(span, 200, model))
            return answer
        except ApiError as error:
            closing.close()
            status = error.status
            server.metrics.refusals.labels(error.code or str(status)).inc()
            return _refused(error, request_id)
        except FlamingoExportError as error:
            closing.close()
            refused = refusal_of(error) or ApiError(500, f"The request failed ({request_id}).", code="internal")
            status = refused.status
            return _refused(refused, request_id)
        except ClientGone:
            closing.close()
            status = _CLOSED_REQUEST
            return Response(status_code=_CLOSED_REQUEST)
        except Exception as error:
            closing.close()
            status = 500
            _log.error("request failed", exc_info=error, extra={"request_id": request_id})
            return _refused(ApiError(500, f"The request failed ({request_id}).", code="internal"), request_id)
        except BaseException:
            closing.close()
            raise
        finally:
            if not streams:
                server.tracing.end(span, status, model)
            server.metrics.requests.labels(path, str(status)).inc()
            _log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "caller": caller,
                    "path": path,
                    "model": model,
                    "status": status,
                    "seconds": round(time.perf_counter() - started, 4),
                },
            )

    return endpoint


def _read(server: Server, answer: Callable[[Server, Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            _caller(server, request)
            return answer(server, request)
        except ApiError as error:
            return _refused(error, _request_id(request))

    return endpoint


def _models(server: Server, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(served) for served in server.models]})


def _model(server: Server, request: Request) -> Response:
    return JSONResponse(_card(server.models.find(request.path_params["name"])))


def _card(served: Served) -> dict[str, Any]:
    manifest = served.model.manifest
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "flamingo-export",
        "max_model_len": manifest.limits.max_length,
        "max_media": manifest.limits.bank_rows,
        # What evaluation marks its numbers with, and puts prompts together by.
        "flamingo": {
            "digest": bundle_digest(manifest),
            "precision": precision_of(manifest),
            "backend": served.model.backend.name,
            "parity": manifest.parity.state,
            "inputs": msgspec.to_builtins(manifest.inputs),
        },
    }


def _metrics(server: Server, _: Request) -> Response:
    return Response(server.metrics.page(), media_type=server.metrics.content_type)


async def _live(_: Request) -> Response:
    return JSONResponse({"status": "live"})


async def _ready(request: Request) -> Response:
    server: Server = request.app.state.server
    if server.draining or not server.models.ready:
        return JSONResponse({"status": "draining" if server.draining else "broken"}, status_code=503)
    return JSONResponse({"status": "ready"})


async def _openapi(_: Request) -> Response:
    from flamingo_export.serve.openapi import description

    return JSONResponse(description())


def page() -> str:
    """The page that asks the model, as HTML."""
    from flamingo_export.pages.template import render

    return render(__package__, "ask.html.j2")


async def _page(_: Request) -> Response:
    return _html(page(), "; script-src 'unsafe-inline'; img-src data: blob:; media-src blob:; connect-src 'self'")


async def _api(_: Request) -> Response:
    from flamingo_export.serve.openapi import page

    return _html(page())


def _html(text: str, allowed: str = "") -> Response:
    """A page that a browser loads nothing for, but what is allowed."""
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'{allowed}"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    text = "There is no such path here." if status == 404 else f"{request.method} does not go with this path."
    return _refused(ApiError(status, text, code="not_found" if status == 404 else "method_not_allowed"), _request_id(request))


def _json(body: dict[str, Any], headers: dict[str, str]) -> Response:
    """An answer. JSON has no infinity: minus infinity, the log-probability of a token that is never generated, is null."""
    return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)


def _refused(error: ApiError, request_id: str) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers={**error.headers, "x-request-id": request_id})


def _caller(server: Server, request: Request) -> str:
    address = request.client.host if request.client is not None else ""
    return server.access.caller(request.headers.get("authorization"), address)


def _count_active(server: Server, closing: ExitStack) -> None:
    server.active += 1

    def ended() -> None:
        server.active -= 1

    closing.callback(ended)


def _request_id(request: Request) -> str:
    """The client's own, where it is short and plain, else a new one."""
    given = request.headers.get("x-request-id", "")
    plain = 0 < len(given) <= 100 and all(letter.isalnum() or letter in "-_." for letter in given) and given.isascii()
    return given if plain else uuid.uuid4().hex


def _log_prompt(server: Server, request_id: str, body: bytes) -> None:
    if server.settings.log_prompts:
        _log.info("body", extra={"request_id": request_id, "body": body[:10_000].decode("utf-8", "replace")})
