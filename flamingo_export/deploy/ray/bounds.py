"""The bound of `serve/held.py` in Ray's proxy.

Ray's proxy reads a body as fast as it comes and hands it on without a bound, so the bound is in the proxy: as the middleware that its
callback brings. The ingress has the same one, for proxies of a cluster that was started without it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from flamingo_export.serve.held import Body, Held, Limits, counted, declared
from flamingo_export.serve.refusals import ApiError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable of the environment in which Ray's proxy finds `middlewares`."""
LIMITS = "FLAMINGO_HELD"
"""Variable of the environment that tells the proxy the limits, as JSON."""


class BoundedBodies:
    """Middleware that refuses what goes beyond the limits, before it is read."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app = app
        self.held = Held(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. One without a body passes: it holds nothing, and health is asked for without."""
        size = declared(Headers(scope=scope)) if scope["type"] == "http" else None
        if size is None:
            await self._app(scope, receive, send)
            return
        try:
            with self.held.body(size) as body:
                await self._bounded(scope, receive, send, body)
        except ApiError as error:
            await JSONResponse(error.body(), status_code=error.status, headers=error.headers)(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, body: Body) -> None:
        """Raises ApiError where a body of unknown length goes beyond the limits, if no answer has begun."""
        refused: ApiError | None = None
        begun = False
        bounded = counted(receive, body)

        async def until_refused() -> Message:
            nonlocal refused
            if refused is None:
                try:
                    return await bounded()
                except ApiError as error:
                    refused = error
            return {"type": "http.disconnect"}  # whoever waits for the rest stops

        async def noticed(message: Message) -> None:
            nonlocal begun
            if refused is None or begun:
                begun = True
                await send(message)

        try:
            await self._app(scope, until_refused, noticed)
        except Exception:
            if refused is None:
                raise
        if refused is not None and not begun:
            raise refused


def middlewares() -> list[Middleware]:
    """What Ray's proxy puts around its application: the bound of LIMITS; nothing where that is not set."""
    said = os.environ.get(LIMITS)
    return [Middleware(BoundedBodies, msgspec.json.decode(said, type=Limits))] if said else []
