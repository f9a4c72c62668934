"""A replica: the server's own ASGI application over one bundle, in a process of Ray's that nobody but the ingress may ask."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flamingo_export.deploy.ray.asgi import Head, answered
from flamingo_export.deploy.ray.settings import RaySettings
from flamingo_export.serve.app import Server, create_app
from flamingo_export.serve.models import Models
from flamingo_export.serve.process import set_up_logs
from flamingo_export.serve.settings import ModelChoice, ServeSettings

if TYPE_CHECKING:
    from flamingo_export.runtime.model import Model


NAME = "x-flamingo-replica"
"""Header of an answer that tells replicas apart: a random name that each takes when it starts."""


class Replica:
    """Opens the bundle and answers what the ingress hands on."""

    def __init__(self, bundle: str, digest: str, settings: bytes, secret: str) -> None:
        """digest: of the bundle's manifest; another one makes Ray replace the replicas. secret: the ingress knows it."""
        import flamingo_export

        asked = msgspec.json.decode(settings, type=RaySettings)
        self._secret = secret
        self._name = secrets.token_hex(4)

        def load(choice: ModelChoice) -> Model:
            return flamingo_export.load(
                choice.bundle,
                backend=asked.backend,
                device=asked.device,
                threads=asked.threads,
                rows=asked.rows,
                queue=asked.queue,
            )

        self._models = Models([ModelChoice(name=asked.model, bundle=Path(bundle))], load)
        served = ServeSettings(
            rows=asked.rows,
            max_queue=asked.queue,
            max_body=asked.max_body,
            held_requests=asked.held_requests,
            held_bytes=asked.held_bytes,
            allow_media_from=asked.allow_media_from,
            timeout=asked.timeout,
        )
        self._server = Server(self._models, served)
        self._app = create_app(self._server)
        set_up_logs()

    async def answer(self, secret: str, scope: dict[str, Any], body: bytes, key: str = "") -> AsyncIterator[Head | bytes]:
        """The head of the answer, then its body in pieces. key: what the request belongs to, for whoever routes it.

        Raises PermissionError for a caller that is not the ingress.
        """
        if not hmac.compare_digest(secret.encode(), self._secret.encode()):
            raise PermissionError("replicas answer their ingress only")
        pieces = answered(self._app, scope, body)
        try:
            async for piece in pieces:
                yield (piece[0], [*piece[1], (NAME, self._name)]) if isinstance(piece, tuple) else piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    def check_health(self) -> None:
        """Ray calls it, and replaces a replica for which it raises."""
        if not self._models.ready:
            raise RuntimeError("the backend fails on every request")

    def __del__(self) -> None:
        if hasattr(self, "_models"):
            self._models.close()
