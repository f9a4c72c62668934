"""What the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flamingo_export.errors import InputError
from flamingo_export.serve.held import Limits


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits and permissions of a server. The defaults are safe on a loopback address.

    host, port: where it listens.
    rows: requests that run at once, per model; None lets the engine choose.
    max_queue: requests that wait beside them, per model.
    max_per_caller: requests of one caller that run or wait; None is any number.
    max_body: bytes of a request's body.
    held_requests, held_bytes: requests whose bodies are read or answered at once, and bytes of these bodies together. A byte counts from when
        it has come until the answer is out.
    max_media: images and videos of a request.
    media_bytes: bytes of one remote medium.
    media_seconds: seconds that fetching one may take, redirects included.
    allow_media_from: origins (`https://images.example`), or URL prefixes, that media may be fetched from. Empty: only data: URLs.
    body_seconds: seconds that a client may take to send its body, and to take each piece of a stream.
    timeout: seconds that a request may take; a request may ask for less.
    drain_seconds: seconds that accepted requests have to finish after SIGTERM.
    log_prompts: whether prompts and answers go to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int | None = None
    max_queue: int = 64
    max_per_caller: int | None = None
    max_body: int = 64 << 20
    held_requests: int = 1024
    held_bytes: int = 256 << 20
    max_media: int = 64
    media_bytes: int = 32 << 20
    media_seconds: float = 10.0
    allow_media_from: tuple[str, ...] = ()
    body_seconds: float = 30.0
    timeout: float = 300.0
    drain_seconds: float = 120.0
    log_prompts: bool = False
    keys: dict[str, str] = field(default_factory=dict, repr=False)
    """API keys by the name that logs and fairness know their holder by; none lets everybody in."""

    def __post_init__(self) -> None:
        """Raises InputError where not even one body may be held."""
        if self.held_requests < 1 or self.held_bytes < self.max_body:
            raise InputError(
                f"at most {self.held_requests} bodies of together {self.held_bytes} bytes are held, and one may have {self.max_body}: "
                "raise --held-requests or --held-bodies, or lower --max-body"
            )

    @property
    def limits(self) -> Limits:
        """What is held at once."""
        return Limits(body=self.max_body, requests=self.held_requests, bytes=self.held_bytes)


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A bundle, and the name that clients know it by."""

    name: str
    bundle: Path
