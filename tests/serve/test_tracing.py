"""Traces: which spans a request leaves, against a stand-in for OpenTelemetry's interface. The real one: tests/deploy/real/test_traces.py."""

from __future__ import annotations

import base64
import io
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from flamingo_export.errors import BackendError
from flamingo_export.serve.tracing import Tracing, traced_to

from .conftest import Client, user

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Span:
    name: str
    context: Any = None
    kind: Any = None
    attributes: dict[str, Any] = field(default_factory=dict)
    start_time: int | None = None
    ends: list[int | None] = field(default_factory=list)
    status: Any = None

    def set_attribute(self, name: str, value: Any) -> None:
        self.attributes[name] = value

    def set_status(self, status: Any) -> None:
        self.status = status

    def end(self, end_time: int | None = None) -> None:
        self.ends.append(end_time)


class Tracer:
    """Keeps the spans that are started."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def start_span(self, name: str, **rest: Any) -> Span:
        self.spans.append(Span(name, **rest))
        return self.spans[-1]

    def ended(self) -> list[Span]:
        """All spans, once the last has ended: a server ends one right after its answer has gone."""
        deadline = time.monotonic() + 20
        while not all(span.ends for span in self.spans) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.spans


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = ModuleType(name)
    made.__path__ = []
    for each, value in content.items():
        setattr(made, each, value)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    """With the part of OpenTelemetry's interface that spans need."""
    module(monkeypatch, "opentelemetry")
    module(monkeypatch, "opentelemetry.propagate", extract=lambda headers: ("caller's", headers.get("traceparent")))
    module(
        monkeypatch,
        "opentelemetry.trace",
        SpanKind=SimpleNamespace(SERVER="server"),
        Status=lambda code: code,
        StatusCode=SimpleNamespace(ERROR="error"),
        set_span_in_context=lambda span: ("within", span),
    )
    return Tracer()


@pytest.fixture
def traced(client: Client, tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The server of all tests, for now with traces."""
    monkeypatch.setattr(client.server, "tracing", Tracing(tracer))
    return client


def asked(client: Client, *, colour: int = 0, **more: Any) -> Any:
    """A request with an image of its own."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (77, colour, 99)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"model": "nano", "messages": user(part), "max_tokens": 4, **more}
    return client.call("POST", "/v1/chat/completions", body, traceparent=PARENT)


def test_a_request_is_a_span_and_its_time_is_divided_without_gaps(tracer: Tracer, traced: Client) -> None:
    usage = asked(traced, colour=3).json["usage"]
    whole, *parts = tracer.ended()
    assert (whole.name, whole.context, whole.kind) == ("POST /v1/chat/completions", ("caller's", PARENT), "server")
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["gen_ai.request.model"] == "nano"
    assert whole.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert (whole.attributes["flamingo.media_encoded"], whole.attributes["flamingo.media_reused"]) == (1, 0)
    assert whole.status is None
    assert [part.name for part in parts] == ["prepare", "queued", "media", "prefill", "decode"]
    assert all(part.context == ("within", whole) for part in parts)
    for one, other in pairwise(parts):
        assert one.ends == [other.start_time]
    assert not any("data:image" in str(value) for span in tracer.spans for value in span.attributes.values())


def test_an_image_that_is_known_is_said_to_be(tracer: Tracer, traced: Client) -> None:
    asked(traced, colour=5)
    asked(traced, colour=5)
    requests = [span.attributes for span in tracer.ended() if span.kind == "server"]
    assert [each["flamingo.media_encoded"] for each in requests] == [1, 0]
    assert [each["flamingo.media_reused"] for each in requests] == [0, 1]


def test_a_stream_ends_its_span_once_and_has_the_same_parts(tracer: Tracer, traced: Client) -> None:
    assert asked(traced, stream=True).events[-1] == "[DONE]"
    whole, *parts = tracer.ended()
    assert len(whole.ends) == 1
    assert [part.name for part in parts] == ["prepare", "queued", "media", "prefill", "decode"]


def test_a_refusal_has_its_status_and_no_parts(tracer: Tracer, traced: Client) -> None:
    assert asked(traced, model="other").status == 404
    (whole,) = tracer.ended()
    assert whole.attributes["http.response.status_code"] == 404
    assert whole.status is None  # the caller's mistake, not the server's


def test_a_failure_is_an_error(tracer: Tracer) -> None:
    tracing = Tracing(tracer)
    tracing.end(tracing.begin("POST", "/v1/score", {}, "id"), 500, "")
    (span,) = tracer.spans
    assert span.status == "error"
    assert "gen_ai.request.model" not in span.attributes
    assert span.attributes["flamingo.request_id"] == "id"


def test_without_a_collector_there_are_no_spans() -> None:
    with traced_to(None) as tracing:
        assert tracing.begin("POST", "/", {}, "id") is None
        tracing.end(None, 500, "nano")


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(BackendError, match=r"pip install '\.\[otel\]'"), traced_to("http://127.0.0.1:4318"):
        pass


def test_spans_go_to_the_collectors_path_and_the_last_are_sent(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Provider:
        def __init__(self, resource: Any) -> None:
            done.append(resource)

        def add_span_processor(self, processor: Any) -> None:
            done.append(processor)

        def get_tracer(self, name: str) -> Tracer:
            return tracer

        def shutdown(self) -> None:
            done.append("shut down")

    for name in ("exporter", "exporter.otlp", "exporter.otlp.proto", "exporter.otlp.proto.http", "sdk"):
        module(monkeypatch, f"opentelemetry.{name}")
    module(monkeypatch, "opentelemetry.exporter.otlp.proto.http.trace_exporter", OTLPSpanExporter=lambda endpoint: endpoint)
    module(monkeypatch, "opentelemetry.sdk.resources", Resource=SimpleNamespace(create=lambda attributes: attributes))
    module(monkeypatch, "opentelemetry.sdk.trace", TracerProvider=Provider)
    module(monkeypatch, "opentelemetry.sdk.trace.export", BatchSpanProcessor=lambda exporter: ("batches", exporter))
    with traced_to("http://collector:4318/") as tracing:
        assert tracing.begin("GET", "/metrics", {}, "id") is tracer.spans[0]
        assert done == [{"service.name": "flamingo-export"}, ("batches", "http://collector:4318/v1/traces")]
    assert done[-1] == "shut down"
