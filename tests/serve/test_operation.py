"""What operators see of the server: models, health, metrics, a drain, a backend that fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import flamingo_export
from flamingo_export.serve.app import Server
from flamingo_export.serve.bodies import Chat, Completion, Scored
from flamingo_export.serve.process import JsonLines
from flamingo_export.serve.settings import ServeSettings

from .conftest import Client, image_part, running, until, user


def test_models_and_health_and_metrics(client: Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json["data"]] == ["nano"]
    assert client.get("/v1/models/nano").json["object"] == "model"
    assert client.get("/health/live").status == client.get("/health/ready").status == 200
    client.chat(messages=user(image_part()))
    text = client.get("/metrics").raw.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['flamingo_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(lines['flamingo_time_to_first_token_seconds_count{model="nano"}']) >= 1
    assert float(lines['flamingo_requests_running{model="nano"}']) == 0
    assert float(lines['flamingo_cache_rows{model="nano"}']) >= 1
    assert float(lines['flamingo_generated_tokens_total{model="nano"}']) >= 1
    assert float(lines['flamingo_rows_shared_total{model="nano"}']) >= 0
    names = {line.partition("{")[0] for line in lines}
    for said in (
        *("requests_running", "requests_waiting", "cache_rows_in_use", "bank_rows", "bank_rows_in_use"),
        *("prompt_tokens_total", "prompt_tokens_reused_total", "media_encoded_total", "media_reused_total"),
        *(
            "time_to_first_token_seconds_bucket",
            "time_between_tokens_seconds_bucket",
            "request_seconds_bucket",
            "model_healthy",
        ),
    ):
        assert f"flamingo_{said}" in names


def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    for path in ("/", "/api"):
        page = client.get(path)
        assert page.status == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        text = page.raw.decode()
        for outside in ("http://", "https://", "//cdn", "@import", "url("):
            assert outside not in text


def test_pages_of_elsewhere_may_not_read_answers(client: Client) -> None:
    asked = client.call(
        "OPTIONS", "/v1/chat/completions", **{"origin": "https://a.example", "access-control-request-method": "POST"}
    )
    assert asked.status == 405
    answered = client.call("POST", "/v1/score", {"model": "nano"}, origin="https://a.example")
    models = client.call("GET", "/v1/models", origin="https://a.example")
    for found in (asked, answered, models, client.call("GET", "/", origin="https://a.example")):
        assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_are_in_the_log_only_where_that_was_asked_for(
    make_server: Callable[..., Server], caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    server = make_server(ServeSettings(log_prompts=asked))
    with running(server) as client, caplog.at_level(logging.DEBUG):
        assert client.chat(messages=user("a confidential question"), max_tokens=1).status == 200
        assert client.chat(messages=user("a confidential <image> tag")).status == 400
        assert client.chat(messages=user("a confidential field"), max_tokens="x").status == 422
    server.models.close()
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("flamingo_export")]
    assert len([line for line in lines if '"request"' in line]) == 3
    assert any("confidential" in line for line in lines) == asked


def test_the_description_names_every_route(client: Client) -> None:
    paths = client.get("/openapi.json").json["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models"} <= set(paths)
    page = client.get("/api").raw.decode()
    for said in (*paths, *(field.encode_name for kind in (Chat, Completion, Scored) for field in msgspec.structs.fields(kind))):
        assert f"<code>{said}</code>" in page
    assert "<td>text or list of text</td>" in page  # stop
    assert "<td>list of Message</td><td>refused</td>" in page


def test_request_ids_come_back(client: Client) -> None:
    found = client.call("POST", "/v1/chat/completions", {"model": "x", "messages": []}, **{"x-request-id": "abc-1"})
    assert found.headers["x-request-id"] == "abc-1"
    other = client.call("POST", "/v1/chat/completions", {"model": "x", "messages": []}, **{"x-request-id": "a b"})
    assert other.headers["x-request-id"] != "a b"


def test_a_server_that_stops_refuses_and_finishes(make_server: Callable[..., Server]) -> None:
    server = make_server()
    with running(server) as client:
        body = {"messages": user(image_part()), "temperature": 2.0, "n": 8, "max_tokens": 100, "seed": 1}
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(client.chat(**body).status))
        thread.start()
        until(lambda: server.active == 1)
        server.draining = True
        refused = client.chat(messages=user(image_part()))
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert client.get("/health/ready").status == 503
        assert client.get("/health/live").status == 200
        thread.join(60)
        assert found == [200]
    server.models.close()


def test_a_backend_that_fails_fails_its_requests_and_turns_unready(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    engine = server.models.find("nano").model.engine
    with running(server) as client:
        with monkeypatch.context() as broken:
            broken.setattr(engine, "submit", _explode)
            for _ in range(3):
                found = client.chat(messages=user(image_part()))
                assert found.status == 500
                assert "secret" not in found.error["message"]
            assert client.get("/health/ready").status == 503
        assert client.chat(messages=user(image_part())).status == 200
        assert client.get("/health/ready").status == 200
    server.models.close()


def test_a_device_that_is_lost_turns_the_server_unready_at_once(make_server: Callable[..., Server]) -> None:
    server = make_server()
    engine = server.models.find("nano").model.engine
    with running(server) as client:
        assert client.get("/health/ready").status == 200
        engine.loop.lost = flamingo_export.errors.BackendLost("secret path of the server")
        assert client.get("/health/ready").status == 503
        found = client.chat(messages=user(image_part()))
        assert (found.status, found.error["code"]) == (503, "device_lost")
        assert "GPU" in found.error["message"]
        assert "secret" not in found.error["message"]
        assert client.get("/health/live").status == 200
    server.models.close()


def test_memory_that_is_short_is_no_fault_of_the_request(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client may try again, and is not told how large the server is; the log says it."""
    server = make_server()
    decoder = server.models.find("nano").model.engines.decoder

    def none_left(name: str, shape: object) -> None:
        raise MemoryError

    with running(server) as client:
        with monkeypatch.context() as full:
            full.setattr(decoder, "allocate", none_left)
            found = client.chat(messages=user(image_part()))
            streamed = client.chat(messages=user(image_part()), stream=True)
        assert (found.status, found.error["code"], found.headers["retry-after"]) == (503, "out_of_memory", "1")
        assert "rows" not in found.error["message"]
        assert any("error" in event and event["error"]["code"] == "out_of_memory" for event in streamed.events[:-1])
        assert client.get("/health/ready").status == 200
        assert client.chat(messages=user(image_part())).status == 200
    assert "--rows" in caplog.text
    server.models.close()


def _explode(*_: object, **__: Any) -> None:
    raise flamingo_export.errors.BackendError("secret path of the server")
