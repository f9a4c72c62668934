"""Refusals in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from flamingo_export.errors import (
    BackendLost,
    CapacityError,
    DeadlineExceeded,
    EngineClosed,
    FlamingoExportError,
    ImageError,
    InputError,
    NoMemory,
    QueueFull,
)

RETRY_AFTER = 1
"""Seconds that a client is asked to wait where the server is busy."""


class ApiError(Exception):
    """A refusal with its status.

    status: of HTTP.
    param: the field of the body that is at fault.
    code: for programs.
    retry: whether the same request may succeed later.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {"Retry-After": str(RETRY_AFTER)} if self.retry else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: FlamingoExportError) -> ApiError | None:
    """What a client is answered for an error of ours; None where it is the server's own failure, whose text stays in its log."""
    text = str(error)
    if isinstance(error, NoMemory):
        return ApiError(
            503, "The server has no memory for this request at the moment. Try again later.", code="out_of_memory", retry=True
        )
    if isinstance(error, CapacityError):
        return ApiError(400, text, code="context_length_exceeded")
    if isinstance(error, ImageError):
        return ApiError(400, text, param="messages", code="invalid_image")
    if isinstance(error, InputError):
        return ApiError(400, text)
    if isinstance(error, QueueFull):
        return ApiError(429, text, code="queue_full", retry=True)
    if isinstance(error, DeadlineExceeded):
        return ApiError(503, text, code="deadline_exceeded", retry=True)
    if isinstance(error, BackendLost):
        return ApiError(503, "The server's GPU failed, and needs a new process.", code="device_lost", retry=True)
    if isinstance(error, EngineClosed):
        return ApiError(
            503, "The model is being exchanged or the server is stopping. Try again.", code="unavailable", retry=True
        )
    return None
