"""Clients that leave, and deadlines: what they used is free."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.ticket import Ticket

from .conftest import ROOT, Client, data_url, image_part, until, user

EXAMPLES = ROOT / "examples"


@pytest.fixture
def slow(client: Client, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, a step of which takes 50 ms."""
    engine = client.server.models.find("nano").model.engine
    tick = engine.loop.tick

    def delayed() -> bool:
        time.sleep(0.05)
        return tick()

    monkeypatch.setattr(engine.loop, "tick", delayed)
    return engine


def test_who_leaves_frees_its_row(client: Client, slow: Engine) -> None:
    engine = slow
    before = engine.stats().cancelled
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        body = {
            "model": "nano",
            "messages": user(image_part()),
            "stream": stream,
            "temperature": 2.0,
            "n": 4,
            "max_tokens": 400,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        until(lambda: engine.stats().running == 1)
        assert connection.sock is not None
        connection.sock.close()
        connection.close()
        until(lambda: engine.stats().running == 0)
    assert engine.stats().cancelled == before + 2
    until(lambda: client.server.active == 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"max_tokens": 400, "temperature": 2.0}),
        ("/v1/completions", {"echo": True}),
        ("/v1/score", {"candidates": ["red"]}),
    ],
)
def test_who_leaves_while_images_are_decoded_takes_no_row(
    client: Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    model = client.server.models.find("nano").model
    entered, leave = threading.Event(), threading.Event()
    tickets: list[Ticket[Any]] = []
    prepare, submit, score = model.prepare, model.engine.submit, model.engine.submit_score

    def waiting(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert leave.wait(30)
        return prepare(*args, **kwargs)

    def noted(submitting: Callable[..., Ticket[Any]]) -> Callable[..., Ticket[Any]]:
        def call(*args: Any, **kwargs: Any) -> Ticket[Any]:
            tickets.append(submitting(*args, **kwargs))
            return tickets[-1]

        return call

    tick = model.engine.loop.tick

    def held() -> bool:
        time.sleep(0.05)
        return tick()

    monkeypatch.setattr(model.engine.loop, "tick", held)
    monkeypatch.setattr(model, "prepare", waiting)
    monkeypatch.setattr(model.engine, "submit", noted(submit))
    monkeypatch.setattr(model.engine, "submit_score", noted(score))
    sent = {"model": "nano", "prompt": "<image>Output: a", "images": [data_url(EXAMPLES / "a.png")], **body}
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.request("POST", path, json.dumps(sent).encode(), {"content-type": "application/json"})
    assert entered.wait(30)
    assert connection.sock is not None
    connection.sock.close()
    connection.close()
    until(lambda: client.server.active == 0)
    leave.set()
    until(lambda: len(tickets) == 1 and tickets[0].done)
    with pytest.raises(CancelledError):
        tickets[0].result()


def test_a_socket_that_is_half_closed_holds_no_row(client: Client, slow: Engine) -> None:
    """Who says that nothing more will come is taken to have left, as servers of ASGI do."""
    body = json.dumps({"model": "nano", "messages": user(image_part()), "min_tokens": 100, "max_tokens": 100}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as raw:
        raw.sendall(head.encode() + body)
        until(lambda: slow.stats().running == 1)
        raw.shutdown(socket.SHUT_WR)
        until(lambda: slow.stats().running == slow.stats().rows_in_use == slow.stats().bank_rows_in_use == 0)


@pytest.mark.usefixtures("slow")
def test_a_deadline(client: Client) -> None:
    found = client.chat(messages=user(image_part()), timeout=0.1)
    assert (found.status, found.error["code"]) == (503, "deadline_exceeded")
    assert found.headers["retry-after"]
