"""OpenTelemetry traces: a span for each request, and within it where its time went. An extra; nothing of it runs where it is not asked for.

    POST /v1/chat/completions ────────────────────────────────────────
      prepare ── queued ── media ── prefill ── decode ────────────────

A client that sends a `traceparent` header finds the request within its own trace. No prompt and no answer is in a span.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flamingo_export.errors import BackendError
from flamingo_export.runtime.timings import Timings

_current: ContextVar[Any] = ContextVar("flamingo_export_span", default=None)


class Tracing:
    """Makes spans. tracer: OpenTelemetry's; None makes none."""

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer

    def begin(self, method: str, path: str, headers: Mapping[str, str], request_id: str) -> Any:
        """The span of a request, None where there are no traces; `end` it."""
        if self._tracer is None:
            return None
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            f"{method} {path}",
            context=extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": path, "flamingo.request_id": request_id},
        )
        _current.set(span)
        return span

    def end(self, span: Any, status: int, model: str) -> None:
        """The request was answered with this status."""
        if span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        span.set_attribute("http.response.status_code", status)
        if model:
            span.set_attribute("gen_ai.request.model", model)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def phases(self, timings: Timings) -> None:
        """Where the time of the request of this task went, which ended just now."""
        span = _current.get()
        if self._tracer is None or span is None:
            return
        from opentelemetry.trace import set_span_in_context

        span.set_attribute("gen_ai.usage.input_tokens", timings.prompt_tokens)
        span.set_attribute("flamingo.reused_tokens", timings.reused_tokens)
        span.set_attribute("flamingo.media_encoded", timings.media_encoded)
        span.set_attribute("flamingo.media_reused", timings.media_reused)
        parts = {
            "prepare": timings.prepare,
            "queued": timings.queued,
            "media": timings.media,
            "prefill": timings.prefill,
            "decode": sum(timings.steps),
        }
        within = set_span_in_context(span)
        at = time.time_ns() - int(1e9 * sum(parts.values()))
        for name, seconds in parts.items():
            part = self._tracer.start_span(name, context=within, start_time=at)
            at += int(1e9 * seconds)
            part.end(end_time=at)


@contextmanager
def traced_to(endpoint: str | None) -> Iterator[Tracing]:
    """Traces that go to a collector, as OTLP over HTTP; none for None. What waits is sent at the end.

    endpoint: `http://127.0.0.1:4318`. Raises BackendError where OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield Tracing()
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise BackendError(f"traces need {error.name}: pip install '.[otel]' (docs/serving.md)") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "flamingo-export"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))
    try:
        yield Tracing(provider.get_tracer("flamingo_export.serve"))
    finally:
        provider.shutdown()
