"""Bodies that Ray's proxy and the ingress hold at once: counted, bounded, and let go of however a request ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse

from flamingo_export.deploy.ray.bounds import LIMITS, BoundedBodies, middlewares
from flamingo_export.deploy.ray.ingress import Ingress
from flamingo_export.deploy.ray.settings import RaySettings, read_settings
from flamingo_export.errors import InputError
from flamingo_export.serve.held import WINDOW, Limits

LIMITED = Limits(body=100, requests=3, bytes=150)


class Client:
    """One request to an application: pieces of a body that are sent when the test says so."""

    def __init__(self, app: Any, *, length: int | None = None, pieces: int = 1) -> None:
        self.sent: list[dict[str, Any]] = []
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        headers = [(b"transfer-encoding", b"chunked")] if length is None else [(b"content-length", b"%d" % length)]
        if not pieces:
            headers = []
        self.scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        self.running = asyncio.ensure_future(app(self.scope, self._messages.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def give(self, size: int, *, more: bool = False) -> None:
        await self._messages.put({"type": "http.request", "body": b"x" * size, "more_body": more})
        await settled()

    async def go(self) -> None:
        await self._messages.put({"type": "http.disconnect"})
        await settled()

    @property
    def status(self) -> int | None:
        starts = [message for message in self.sent if message["type"] == "http.response.start"]
        assert len(starts) <= 1
        return starts[0]["status"] if starts else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Reads a whole body and says how long it was; 499 to a client that goes."""
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        await JSONResponse({}, status_code=499)(scope, receive, send)
        return
    await JSONResponse({"length": len(body)})(scope, receive, send)


async def stubborn(scope: Any, receive: Any, send: Any) -> None:
    """Fails where a body does not end."""
    await Request(scope, receive).body()


def run(test: Any) -> None:
    asyncio.run(test())


def test_a_declared_body_is_refused_before_it_comes():
    async def test() -> None:
        bounded = BoundedBodies(echo, LIMITED)
        large = Client(bounded, length=101)
        first = Client(bounded, length=100)
        await first.give(99, more=True)
        second = Client(bounded, length=52)
        await settled()
        assert (large.status, first.status, second.status) == (413, None, 503)
        assert second.headers[b"retry-after"] == b"1"
        assert json.loads(second.sent[1]["body"])["error"]["code"] == "bodies_full"
        third = Client(bounded, length=50)
        await first.give(1)
        await third.give(50)
        assert (first.status, third.status) == (200, 200)
        assert (bounded.held.requests, bounded.held.bytes) == (0, 0)

    run(test)


def test_more_requests_than_are_held_come_back_later():
    async def test() -> None:
        bounded = BoundedBodies(echo, LIMITED)
        waiting = [Client(bounded, length=1) for _ in range(3)]
        await settled()
        refused, healthy = Client(bounded, length=1), Client(bounded, pieces=0)
        await healthy.give(0)
        assert (refused.status, refused.headers[b"retry-after"], healthy.status) == (429, b"1", 200)
        await waiting[0].go()
        again = Client(bounded, length=1)
        await again.give(1)
        assert (waiting[0].status, again.status) == (499, 200)
        for each in waiting[1:]:
            await each.give(1)
        assert (bounded.held.requests, bounded.held.bytes) == (0, 0)

    run(test)


@pytest.mark.parametrize("app", [echo, stubborn])
def test_a_body_that_does_not_come_gives_its_place_to_another(app):
    async def test() -> None:
        bounded = BoundedBodies(app, LIMITED)
        now = 0.0
        bounded.held.clock = lambda: now
        idle = [Client(bounded, length=100) for _ in range(3)]
        await settled()
        now += WINDOW
        asked = Client(bounded, length=100)
        await asked.give(99, more=True)
        assert sorted(client.status or 0 for client in idle) == [0, 0, 503]
        assert (asked.status, bounded.held.requests, bounded.held.bytes) == (None, 3, 99)
        for client in idle:
            await client.go()
        await asked.give(1)
        await asyncio.gather(*(client.running for client in [*idle, asked]), return_exceptions=True)
        assert (bounded.held.requests, bounded.held.bytes) == (0, 0)

    run(test)


@pytest.mark.parametrize("app", [echo, stubborn])
def test_a_body_of_unknown_length_is_counted_as_it_comes(app):
    async def test() -> None:
        bounded = BoundedBodies(app, LIMITED)
        one, other = Client(bounded), Client(bounded)
        await settled()
        await one.give(60, more=True)
        assert bounded.held.bytes == 60
        await other.give(90, more=True)
        await one.give(1, more=True)
        assert (one.status, other.status) == (503, None)
        await one.running
        assert (bounded.held.requests, bounded.held.bytes) == (1, 90)
        await other.give(11, more=True)
        assert other.status == 413
        await other.running
        assert (bounded.held.requests, bounded.held.bytes) == (0, 0)

    run(test)


def test_an_answer_that_has_begun_is_not_begun_again():
    async def answers_first(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def test() -> None:
        bounded = BoundedBodies(answers_first, LIMITED)
        client = Client(bounded)
        await client.give(101)
        assert (client.status, bounded.held.bytes) == (200, 0)

    run(test)


def test_what_an_application_fails_with_is_not_hidden():
    async def test() -> None:
        client = Client(BoundedBodies(stubborn, LIMITED), length=5)
        await client.go()
        with pytest.raises(ClientDisconnect):
            await client.running

    run(test)


def test_a_proxy_reads_its_limits_where_they_were_put(monkeypatch):
    monkeypatch.delenv(LIMITS, raising=False)
    assert middlewares() == []
    monkeypatch.setenv(LIMITS, msgspec.json.encode(LIMITED).decode())
    (found,) = middlewares()
    assert BoundedBodies(echo, *found.args).held._limits == LIMITED  # type: ignore[arg-type]


def asked(front: Ingress, size: int) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    body = b'{"stream": true, "pad": "' + b"x" * size + b'"}'
    headers = [(b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    return front.respond(Request({**scope, "client": ("1.2.3.4", 0)}, receive))


@pytest.mark.parametrize("reads", [True, False])
def test_the_ingress_holds_a_body_until_its_stream_is_out(reads):
    async def replicas(scope: Any, body: bytes, key: str) -> Any:
        yield 200, [("content-type", "text/event-stream")]
        yield b"data: [DONE]\n\n"

    async def test() -> None:
        settings = RaySettings(model="m", max_body=100, held_bytes=150, held_requests=2)
        front = Ingress(replicas, settings)
        streams = [await asked(front, 40), await asked(front, 40)]
        assert all(isinstance(each, StreamingResponse) for each in streams)
        refused = await asked(front, 1)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        async def send(_: Any) -> None:
            if not reads:
                raise OSError("gone")

        for each in streams:
            await asyncio.gather(each({"type": "http"}, receive, send), return_exceptions=True)
        third = await asked(front, 40)
        assert [(await asked(front, size)).status_code for size in (75, 65)] == [413, 503]
        del third  # nobody has read it
        assert (await asked(front, 65)).status_code == 200

    run(test)


def test_settings_bound_what_is_held(tmp_path):
    file = tmp_path / "settings.json"
    for wrong in ('held_requests": 0', 'max_body": 100, "held_bytes": 99'):
        file.write_text('{"model": "m", "' + wrong + "}")
        with pytest.raises(InputError, match="held_bytes"):
            read_settings(file)
