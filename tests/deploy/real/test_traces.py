"""Traces that a collector of OpenTelemetry's receives: the server as a process, its spans as OTLP over HTTP.

make test-deploy
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from .conftest import chat_body, free_port, post

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel: make test-deploy")
pytest.importorskip("opentelemetry.exporter.otlp")
pytestmark = [pytest.mark.deploy, pytest.mark.slow]
PARTS = ["prepare", "queued", "media", "prefill", "decode"]


@pytest.fixture
def collector() -> Iterator[tuple[int, list[Any]]]:
    """A port, and the spans that came there."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            raw = self.rfile.read(int(self.headers["content-length"]))
            raw = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
            for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], spans
    server.shutdown()


def test_a_request_is_a_span_with_its_parts(collector, nano_bundle, picture):
    receiver, spans = collector
    port = free_port()
    line = [
        sys.executable,
        "-m",
        "flamingo_export",
        "serve",
        "--name",
        f"nano={nano_bundle}",
        "--port",
        str(port),
        "--threads",
        "1",
    ]
    process = subprocess.Popen(
        [*line, "--trace-to", f"http://127.0.0.1:{receiver}"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.3)
        trace = "0af7651916cd43dd8448eb211c80319c"
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(chat_body(picture(0))).encode(),
            {"content-type": "application/json", "traceparent": f"00-{trace}-b7ad6b7169203331-01"},
        )
        assert urllib.request.urlopen(asked, timeout=60).status == 200
        assert post(port, chat_body(picture(1), stream=True))[0] == 200
        assert post(port, {**chat_body(picture(1)), "model": "none"})[0] == 404
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    requests = [span for span in spans if span.name == "POST /v1/chat/completions"]
    statuses = [next(a.value.int_value for a in span.attributes if a.key == "http.response.status_code") for span in requests]
    assert sorted(statuses) == [200, 200, 404]
    assert requests[0].trace_id.hex() == trace
    for span, status in zip(requests, statuses, strict=True):
        parts = [other for other in spans if other.parent_span_id == span.span_id]
        assert [part.name for part in parts] == (PARTS if status == 200 else [])
        for one, other in pairwise(parts):
            assert one.end_time_unix_nano == other.start_time_unix_nano
        if parts:
            assert abs(parts[-1].end_time_unix_nano - span.end_time_unix_nano) < 0.5e9
            assert parts[0].start_time_unix_nano >= span.start_time_unix_nano - 0.05e9
    assert not [a for span in spans for a in span.attributes if "data:image" in a.value.string_value]
