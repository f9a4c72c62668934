"""What the server refuses, and what it says then."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flamingo_export.serve.app import Server
from flamingo_export.serve.settings import ServeSettings

from .conftest import ROOT, Client, data_url, image_part, running, until, user

QUESTION = "What colour is the square?"
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other", "messages": user("a")}, 404, "There are nano"),
        ({"model": "nano", "messages": []}, 400, "messages is empty"),
        ({"model": "nano", "messages": user("a <image> b")}, 400, "<image>"),
        ({"model": "nano", "messages": user("a <EOC> b")}, 400, "<EOC>"),
        ({"model": "nano", "messages": user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})}, 400, "data: URLs"),
        ({"model": "nano", "messages": user({"type": "image_url", "image_url": {"url": "data:,nonsense"}})}, 400, "image"),
        ({"model": "nano", "messages": user(*[image_part()] * 65)}, 400, "images and videos"),
        ({"model": "nano", "messages": user("a"), "n": 0}, 400, "n is 0"),
        ({"model": "nano", "messages": user("a"), "beams": 129}, 400, "beams is 129"),
        ({"model": "nano", "messages": user("a"), "beams": 0}, 400, "beams is 0"),
        ({"model": "nano", "messages": user("a"), "beams": 4, "n": 5}, 400, "needs at least 5 beams"),
        ({"model": "nano", "messages": user("a"), "temperature": -1}, 400, "temperature"),
        ({"model": "nano", "messages": user("a"), "max_tokens": 100_000}, 400, "cache slots"),
        ({"model": "nano", "messages": user("word " * 5000)}, 400, "cache slots"),
        ({"model": "nano", "messages": user("a"), "beams": 2, "temperature": 1}, 400, "exclude"),
        ({"model": "nano", "messages": user("a"), "timeout": -1}, 400, "timeout"),
        ({"model": "nano", "messages": user("a"), "tools": [{}]}, 400, "tools"),
        ({"model": "nano", "messages": user("a"), "response_format": {"type": "xml"}}, 400, "response_format"),
        ({"model": "nano", "messages": user("a"), "logit_bias": dict.fromkeys(map(str, range(301)), 1)}, 400, "at most 300"),
        ({"model": "nano", "messages": user("a"), "choice": ["a\x7fb", "\ud800"]}, 400, "JSON"),
        ({"model": 3, "messages": user("a")}, 422, "model"),
    ],
)
def test_refusals(client: Client, body: dict[str, Any], status: int, said: str) -> None:
    found = client.post("/v1/chat/completions", body)
    assert (found.status, set(found.error)) == (status, {"message", "type", "param", "code"})
    assert said in found.error["message"]
    assert "/work" not in found.error["message"]
    assert found.headers["x-request-id"]


def test_an_image_may_not_name_a_file(client: Client, tmp_path: Path) -> None:
    for url in (str(EXAMPLES / "a.png"), f"file://{EXAMPLES / 'a.png'}"):
        assert client.chat(messages=user({"type": "image_url", "image_url": url})).status == 400
        assert client.post("/v1/completions", {"model": "nano", "prompt": "<image>Output:", "images": [url]}).status == 400


@pytest.mark.parametrize("raw", [b"", b"{", b"null", b"\xff\xfe", b"[" * 200_000])
def test_bodies_that_are_no_json(client: Client, raw: bytes) -> None:
    assert client.post("/v1/chat/completions", raw).status == 400


def test_paths_and_methods_that_there_are_not(client: Client) -> None:
    assert client.get("/v1/nothing").error["code"] == "not_found"
    assert client.get("/v1/chat/completions").error["code"] == "method_not_allowed"


def test_keys(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(keys={"ann": "a" * 20}))
    with running(server) as client:
        assert client.chat(messages=user(image_part())).status == 401
        assert client.get("/v1/models").status == client.get("/metrics").status == 401
        assert client.get("/health/ready").status == client.get("/").status == 200
        client.headers = {"authorization": "Bearer " + "a" * 20}
        assert client.chat(messages=user(image_part())).status == 200
    server.models.close()


def test_a_body_that_is_too_large_is_refused_unread(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(max_body=1000))
    with running(server) as client:
        assert client.post("/v1/chat/completions", b"x" * 1001).status == 413
        # Without a length, and without an end: the refusal does not wait for the rest.
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            raw.sendall(b"7d0\r\n" + b"x" * 2000 + b"\r\n")
            assert b"413" in raw.recv(100)
    server.models.close()


def test_a_client_that_sends_nothing(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(body_seconds=0.2))
    with running(server) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
            assert b"400" in raw.recv(100)
        assert server.active == 0
    server.models.close()


def test_a_caller_with_too_many_requests(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(max_per_caller=1))
    with running(server) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
            until(lambda: server.active == 1)
            found = client.chat(messages=user(image_part()))
            assert (found.status, found.headers["retry-after"]) == (429, "1")
        until(lambda: server.active == 0)
        assert client.chat(messages=user(image_part())).status == 200
    server.models.close()


def test_a_full_queue_refuses_before_images_are_read(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are they fetched, nor is the engine asked to take the request."""
    server = make_server(ServeSettings(max_queue=2))
    engine = server.models.find("nano").model.engine
    stats = dataclasses.replace(engine.stats(), running=engine.rows, waiting=2)
    monkeypatch.setattr(engine, "stats", lambda: stats)
    monkeypatch.setattr(server.fetcher, "get", lambda url: pytest.fail("an image was read"))
    monkeypatch.setattr(engine, "submit", lambda *rest, **settings: pytest.fail("it was handed in"))
    with running(server) as client:
        for stream in (False, True):
            found = client.chat(messages=user(image_part()), stream=stream)
            assert (found.status, found.error["code"], found.headers["retry-after"]) == (429, "queue_full", "1")
        body = {"model": "nano", "candidates": ["a"], "messages": user(image_part())}
        assert client.post("/v1/score", body).status == 429
        echo = {"model": "nano", "prompt": "<image>a", "images": [data_url(EXAMPLES / "a.png")], "echo": True, "logprobs": 1}
        assert client.post("/v1/completions", echo).status == 429
    server.models.close()


@pytest.mark.parametrize("stream", [False, True])
def test_more_branches_than_the_engine_has(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """An engine built for 8 branches: what is asked for beyond them is said, and 8 are still answered."""
    server = make_server()
    decoder = server.models.find("nano").model.engine.loop.decoder
    monkeypatch.setattr(type(decoder), "largest", property(lambda _: {"S": 8}))
    with running(server) as client:
        asks = {"beams": {"beams": 9}, "beams and n": {"beams": 12, "n": 3}, "samples": {"n": 9, "temperature": 1}}
        for name, wide in asks.items():
            found = client.chat(messages=user(image_part()), stream=stream, max_tokens=2, **wide)
            assert (found.status, found.error["type"]) == (400, "invalid_request_error"), name
            assert (
                f"{wide.get('beams', 9)} beams or samples of a request were asked for, the engine takes 8"
                in found.json["error"]["message"]
            )
        assert client.post("/v1/completions", {"model": "nano", "prompt": "a", "n": 9, "temperature": 1}).status == 400
        assert client.chat(messages=user(image_part()), max_tokens=2, beams=8, n=8, stream=stream).status == 200
    server.models.close()


def test_more_prompts_than_ever_fit_are_not_told_to_try_again(make_server: Callable[..., Server]) -> None:
    """With echo and tokens behind it, each of them is two requests."""
    server = make_server(ServeSettings(max_queue=2), rows=2)
    with running(server) as client:
        body = {"model": "nano", "prompt": ["a", "b", "c", "d"], "max_tokens": 1}
        assert client.post("/v1/completions", body).status == 200
        assert client.post("/v1/completions", {**body, "max_tokens": 0, "echo": True}).status == 200
        for more in ({"prompt": list("abcde")}, {"echo": True, "prompt": list("abc")}):
            found = client.post("/v1/completions", {**body, **more})
            assert (found.status, found.error["param"]) == (400, "prompt")
            assert "4 at most" in found.error["message"]
    server.models.close()


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("chat/completions", {"max_tokens": 0}, "max_tokens is 0"),
        ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ("chat/completions", {"max_tokens": 2, "min_tokens": 3}, "min_tokens is 3, max_tokens only 2"),
        ("chat/completions", {"beams": 2, "n": 3}, "n 3 needs at least 3 beams"),
        ("completions", {"logprobs": 21}, "logprobs is 21"),
        ("completions", {"stop": ["{x}", "}", ""]}, "stop is ['{x}', '}', '']"),
    ],
)
def test_fields_are_named_as_the_body_names_them(client: Client, path: str, fields: dict[str, Any], said: str) -> None:
    """`generate`'s own names are no fields here, and would be refused."""
    asked = {"messages": user("a")} if path.startswith("chat") else {"prompt": "a"}
    found = client.post(f"/v1/{path}", {"model": "nano", **asked, **fields})
    assert found.status == 400
    assert found.error["message"].startswith(said)


def test_those_whose_images_are_decoded_count_as_waiting(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or they would stand in line for that, only to be refused by the engine's queue."""
    server = make_server(ServeSettings(max_queue=0), rows=2)
    held, get = threading.Event(), server.fetcher.get

    def slowly(url: str) -> bytes:
        assert held.wait(60)
        return get(url)

    monkeypatch.setattr(server.fetcher, "get", slowly)
    with running(server) as client, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(client.chat, messages=user(image_part())) for _ in range(2)]
        until(lambda: server.active == 2 and sum(server._prepared.values()) == 2)
        found = client.chat(messages=user(image_part()))
        held.set()
        assert (found.status, found.error["code"]) == (429, "queue_full")
        assert [each.result().status for each in accepted] == [200, 200]
        assert not server._prepared
    server.models.close()
