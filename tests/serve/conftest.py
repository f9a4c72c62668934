"""nano behind a real server on a loopback port, and a client that speaks plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import flamingo_export
from flamingo_export.serve.app import Server, create_app
from flamingo_export.serve.models import Models
from flamingo_export.serve.settings import ModelChoice, ServeSettings
from flamingo_export.sources.choice import source_for_size

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def events(self) -> list[Any]:
        """Of a stream; the last one is `[DONE]`."""
        texts = [part.removeprefix("data: ") for part in self.raw.decode().split("\n\n") if part]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])


@dataclass
class Client:
    """Asks a running server."""

    port: int
    server: Server
    headers: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, raw, {"content-type": "application/json", **self.headers, **headers})
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Answer:
        return self.call("POST", path, body)

    def chat(self, **body: Any) -> Answer:
        return self.post("/v1/chat/completions", {"model": "nano", **body})


@contextmanager
def running(server: Server, app: Any = None) -> Iterator[Client]:
    """A server in a thread, on a port that the system chooses. Its models stay open. app: in place of the server's own."""
    config = uvicorn.Config(app or create_app(server), host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none")
    process = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(process.serve()), daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not process.started:
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.01)
    try:
        yield Client(process.servers[0].sockets[0].getsockname()[1], server)
    finally:
        process.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's trained weights. Do not change it."""
    path = tmp_path_factory.mktemp("serve") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    return path


@pytest.fixture(scope="session")
def nano(nano_bundle: Path) -> Iterator[flamingo_export.Model]:
    """The model, opened by itself: what the server's answers are compared with."""
    with flamingo_export.load(nano_bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def make_server(nano_bundle: Path) -> Callable[..., Server]:
    """A server of nano with other settings."""

    def make(settings: ServeSettings | None = None, rows: int | None = None, **rest: Any) -> Server:
        def opened(choice: ModelChoice) -> flamingo_export.Model:
            return flamingo_export.load(choice.bundle, threads=1, rows=rows)

        return Server(Models([ModelChoice(name="nano", bundle=nano_bundle)], opened), settings or ServeSettings(), **rest)

    return make


@pytest.fixture(scope="session")
def client(make_server: Callable[..., Server]) -> Iterator[Client]:
    """A server with default settings."""
    server = make_server()
    with running(server) as found:
        yield found
    server.models.close()


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def image_part(name: str = "a.png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(ROOT / "examples" / name)}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)
