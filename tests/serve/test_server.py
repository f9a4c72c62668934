"""The server through HTTP: its answers are those of the model, its refusals say what to do."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

import flamingo_export
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.serve.app import Server
from flamingo_export.serve.settings import ServeSettings

from .conftest import ROOT, Client, data_url, image_part, running, user

QUESTION = "What colour is the square?"
EXAMPLES = ROOT / "examples"


def test_a_caption(client: Client, nano: flamingo_export.Model) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1)
    found = client.chat(messages=user(image_part())).json
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert found["object"] == "chat.completion"
    assert found["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]


def test_a_question_with_beams_and_log_probabilities(client: Client, nano: flamingo_export.Model) -> None:
    prompt = f"<image>Question: {QUESTION} Answer:"
    wanted = nano.generate(prompt, images=[EXAMPLES / "q.png"], beams=3, num_return=3)
    found = client.chat(messages=user(image_part("q.png"), QUESTION), beams=3, n=3, logprobs=True).json
    assert [choice["message"]["content"] for choice in found["choices"]] == [
        wanted.text,
        *(other.text for other in wanted.alternatives),
    ]
    values = [token["logprob"] for token in found["choices"][0]["logprobs"]["content"]]
    assert values == pytest.approx(wanted.token_logprobs, abs=1e-4)
    assert [other["text"] for other in found["flamingo"]["alternatives"]] == [other.text for other in wanted.alternatives]


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "purple"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_answers_of_a_given_form(client: Client) -> None:
    pytest.importorskip("llguidance", reason="the extra `constraints`")
    jsonschema = pytest.importorskip("jsonschema", reason="the oracle of JSON schemas")
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for form in (
        {"response_format": wrapped},
        {"json_schema": SCHEMA, "beams": 2},
        {"response_format": wrapped, "temperature": 1, "n": 2},
    ):
        for choice in client.chat(messages=user(image_part()), **form).json["choices"]:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    found = client.chat(messages=user(image_part()), response_format={"type": "json_object"}, max_tokens=200).json["choices"][0]
    assert found["finish_reason"] == "length" or isinstance(json.loads(found["message"]["content"]), dict)
    choices = ["a red square", "purple"]
    assert client.chat(messages=user(image_part()), choice=choices).json["choices"][0]["message"]["content"] in choices
    body = {"model": "nano", "prompt": "It is", "regex": "[0-9]{3}", "logprobs": 1}
    found = client.post("/v1/completions", body).json["choices"][0]
    assert found["text"].strip().isdigit()
    assert len(found["text"].strip()) == 3


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "no json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wrong"}}}},
            "Invalid type",
        ),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, "exclude each other"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a", "choice": ["a"]}, "only one of"),
        (
            {"json_schema": {"allOf": [{"anyOf": [{"properties": {f"k{a}{b}": {}}} for b in range(6)]} for a in range(8)]}},
            "form",
        ),
        ({"json_schema": {"enum": ["x" * 70_000]}}, "at most 65536"),
        ({"json_schema": {"$ref": "#"}}, "form"),
    ],
)
def test_forms_that_cannot_be(client: Client, form: dict[str, Any], said: str) -> None:
    pytest.importorskip("llguidance", reason="the extra `constraints`")
    found = client.chat(messages=user(image_part()), **form)
    assert found.status == 400
    assert said in found.error["message"]


def test_shots_and_turns_are_the_same_prompt(client: Client, nano: flamingo_export.Model) -> None:
    shot = {"image": data_url(EXAMPLES / "a.png"), "caption": "a purple square"}
    by_shots = client.chat(messages=user(image_part("q.png")), shots=[shot])
    turns = [*user(image_part()), {"role": "assistant", "content": "a purple square"}, *user(image_part("q.png"))]
    by_turns = client.chat(messages=turns)
    wanted = nano.generate(
        "<image>Output: a purple square<EOC><image>Output:", images=[EXAMPLES / "a.png", EXAMPLES / "q.png"], beams=1
    )
    texts = [answer.json["choices"][0]["message"]["content"] for answer in (by_shots, by_turns)]
    assert texts == [wanted.text] * 2
    assert by_shots.json["flamingo"]["phi"] == 2


def test_a_stream_is_the_whole_in_pieces(client: Client) -> None:
    whole = client.chat(messages=user(image_part()), logprobs=True).json
    stream = client.chat(messages=user(image_part()), logprobs=True, stream=True, stream_options={"include_usage": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    *events, done = stream.events
    assert done == "[DONE]"
    *chunks, last = events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["choices"][0]["message"]["content"]
    tokens = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [token["token"] for token in tokens] == [token["token"] for token in whole["choices"][0]["logprobs"]["content"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("settings", [{"temperature": 1.5, "n": 6, "seed": 5}, {"beams": 3, "n": 2}])
def test_several_texts_stream_as_they_come_whole(client: Client, settings: dict[str, float]) -> None:
    whole = client.chat(messages=user(image_part()), **settings).json
    events = client.chat(messages=user(image_part()), stream=True, **settings).events[:-1]
    choices = [event["choices"][0] for event in events]
    texts = [
        "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)
        for index in range(len(whole["choices"]))
    ]
    # Whole they come best first; samples stream in the order in which they were drawn.
    assert sorted(texts) == sorted(choice["message"]["content"] for choice in whole["choices"])
    if "beams" in settings:
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]


@pytest.mark.parametrize("settings", [{}, {"beams": 3}])
def test_stop_texts(client: Client, nano: flamingo_export.Model, settings: dict[str, int]) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=settings.get("beams", 1), stop=["triang"])
    whole = client.chat(messages=user(image_part()), stop="triang", **settings).json["choices"][0]
    assert whole["message"]["content"] == wanted.text == "two green"
    assert whole["finish_reason"] == "stop"
    events = client.chat(messages=user(image_part()), stop=["triang"], stream=True, **settings).events[:-1]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == wanted.text


def test_the_likeliest_tokens_at_each_place(client: Client, nano: flamingo_export.Model) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1, top_logprobs=3)
    body = {"messages": user(image_part()), "logprobs": True, "top_logprobs": 3}
    whole = client.chat(**body).json["choices"][0]["logprobs"]["content"]
    found = [[other["logprob"] for other in token["top_logprobs"]] for token in whole]
    for values, place in zip(found, wanted.top_logprobs, strict=True):
        assert values == pytest.approx([value for _, value in place], abs=1e-4)
    events = client.chat(**body, stream=True).events[:-1]
    streamed = [token for event in events for token in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [token["top_logprobs"] for token in streamed] == [token["top_logprobs"] for token in whole]
    raw = {"model": "nano", "prompt": "<image>Output:", "images": [data_url(EXAMPLES / "a.png")], "logprobs": 2}
    places = client.post("/v1/completions", raw).json["choices"][0]["logprobs"]["top_logprobs"]
    assert [max(place.values()) for place in places] == pytest.approx([place[0][1] for place in wanted.top_logprobs], abs=1e-4)
    assert client.chat(messages=user(image_part()), top_logprobs=2).status == 400


def test_search_options_reach_the_search(client: Client, nano: flamingo_export.Model) -> None:
    token = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1).token_ids[0]
    settings = {"min_tokens": 8, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    own: dict[str, Any] = {"min_new_tokens": 8, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1, logit_bias={token: -100.0}, **own)
    found = client.chat(messages=user(image_part()), logit_bias={str(token): -100}, **settings).json["choices"][0]
    assert found["message"]["content"] == wanted.text
    assert client.chat(messages=user(image_part()), logit_bias={"red": 1}).status == 400


def test_a_seed_gives_the_same_draws(client: Client) -> None:
    def draw(seed: int) -> list[str]:
        found = client.chat(messages=user(image_part()), temperature=1.5, n=4, seed=seed).json
        return [choice["message"]["content"] for choice in found["choices"]]

    assert draw(1) == draw(1)
    assert any(draw(1) != draw(seed) for seed in (2, 3, 4))


def test_temperature_zero_is_greedy_whatever_the_seed(client: Client) -> None:
    plain, zero = (
        client.chat(messages=user(image_part()), **more).json for more in ({}, {"temperature": 0, "seed": 3, "top_p": 1})
    )
    assert plain["choices"] == zero["choices"]


def test_completions_of_a_raw_prompt(client: Client, nano: flamingo_export.Model) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1)
    body = {"model": "nano", "prompt": "<image>Output:", "images": [data_url(EXAMPLES / "a.png")], "logprobs": 1}
    found = client.post("/v1/completions", body).json
    assert found["choices"][0]["text"].strip() == wanted.text
    assert found["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(wanted.token_logprobs, abs=1e-4)


def test_offsets_are_places_in_the_text(client: Client) -> None:
    """In a stream too, and where the prompt has tags, which the text leaves out."""
    body = {"model": "nano", "prompt": "<image>Output:", "images": [data_url(EXAMPLES / "a.png")], "logprobs": 1}
    (choice,) = client.post("/v1/completions", body).json["choices"]
    (echoed,) = client.post("/v1/completions", {**body, "echo": True}).json["choices"]
    for text, found in ((choice["text"], choice["logprobs"]), (echoed["text"], echoed["logprobs"])):
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert token in ("<BOS>", "<image>", "<EOC>") or text[offset:].startswith(token)
    events = client.post("/v1/completions", {**body, "stream": True}).events[:-1]
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert [offset for piece in pieces if piece for offset in piece["text_offset"]] == choice["logprobs"]["text_offset"]


def test_echo_scores_the_prompt(client: Client, nano: flamingo_export.Model) -> None:
    """As an evaluation harness asks: the context's and the answer's tokens, no new ones."""
    (wanted,) = nano.score("<image>Output:", [" a purple square"], images=[EXAMPLES / "a.png"], end=False)
    body = {"model": "nano", "prompt": "<image>Output: a purple square", "images": [data_url(EXAMPLES / "a.png")]}
    found = client.post("/v1/completions", {**body, "max_tokens": 0, "echo": True, "logprobs": 1}).json
    values = found["choices"][0]["logprobs"]["token_logprobs"]
    count = len(wanted.token_logprobs)
    assert values[-count:] == pytest.approx(wanted.token_logprobs, abs=1e-4)
    assert values[0] is None


def test_echo_as_lm_evaluation_harness_asks(client: Client, nano: flamingo_export.Model) -> None:
    """It wants one new token, which it drops, and the likeliest at each place: whether an answer is the greedy one."""
    image = EXAMPLES / "a.png"
    greedy = nano.generate("<image>Output:", images=[image], beams=1)
    ids = nano.prepare(flamingo_export.Request(prompt="<image>Output:", media=[image])).token_ids.tolist()
    body = {
        "model": "nano",
        "images": [data_url(image)],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1,
        "echo": True,
    }

    def answer(words: list[int]) -> tuple[list[float], list[float]]:
        found = client.post("/v1/completions", {**body, "prompt": [[*ids, *words]]}).json
        values = found["choices"][0]["logprobs"]
        assert len(values["tokens"]) == len(values["top_logprobs"]) == len(ids) + len(words) + 1
        assert found["usage"]["completion_tokens"] == 1
        return values["token_logprobs"][len(ids) : -1], [max(top.values()) for top in values["top_logprobs"][len(ids) : -1]]

    words = list(greedy.token_ids[:-1])
    own, best = answer(words)
    assert own == best == pytest.approx(greedy.token_logprobs[:-1], abs=1e-4)
    own, best = answer([words[1], words[0]])
    assert own[0] < best[0] == pytest.approx(greedy.token_logprobs[0], abs=1e-4)


def test_fewer_texts_than_were_asked_for_stream_as_they_are_answered(client: Client) -> None:
    """There are three ways to write one letter: with a blank before it, with the two as one token, and without."""
    body = {"model": "nano", "prompt": "a", "regex": "a", "beams": 8, "n": 8, "max_tokens": 5}
    whole = client.post("/v1/completions", body).json["choices"]
    *events, done = client.post("/v1/completions", {**body, "stream": True}).events
    assert 0 < len(whole) < 8
    assert done == "[DONE]"
    pieces = [choice for event in events for choice in event["choices"]]
    for choice in whole:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_echo_cuts_what_follows_at_a_stop_text(client: Client) -> None:
    """And not the prompt, which may hold one."""
    body = {"model": "nano", "prompt": "Output: a red", "max_tokens": 12}
    (whole,) = client.post("/v1/completions", body).json["choices"]
    for stop in (whole["text"][3:6], "red"):
        (cut,) = client.post("/v1/completions", {**body, "stop": stop}).json["choices"]
        (echoed,) = client.post("/v1/completions", {**body, "stop": stop, "echo": True}).json["choices"]
        assert echoed["text"] == body["prompt"] + cut["text"]


def test_scores(client: Client, nano: flamingo_export.Model) -> None:
    colours = ["red", "green", "purple"]
    wanted = nano.score(f"<image>Question: {QUESTION} Answer:", colours, images=[EXAMPLES / "q.png"])
    found = client.post("/v1/score", {"model": "nano", "messages": user(image_part("q.png"), QUESTION), "candidates": colours})
    assert [score["logprob"] for score in found.json["scores"]] == pytest.approx([score.logprob for score in wanted], abs=1e-4)


def test_a_candidate_that_is_never_generated_has_no_number(client: Client) -> None:
    """Its log-probability is minus infinity, which JSON cannot say."""
    body = {"model": "nano", "messages": user(image_part("q.png"), QUESTION)}
    (alone,) = client.post("/v1/score", {**body, "candidates": ["red"]}).json["scores"]
    found = client.post("/v1/score", {**body, "candidates": ["red", "<image>"]})
    assert found.status == 200
    assert found.json["scores"][0]["logprob"] == pytest.approx(alone["logprob"], abs=1e-4)
    assert found.json["scores"][1]["logprob"] is None
    assert None in found.json["scores"][1]["token_logprobs"]


def test_echo_takes_tags_around_an_image_as_a_condition(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """IDEFICS writes <fake_token_around_image> after an image; it is never generated, so it has no log-probability to sum."""
    model = client.server.models.find("nano").model
    assert model.tokenizer is not None
    (around,) = model.tokenizer.encode("Output", add_bos=False)
    tokens = msgspec.structs.replace(model.config.tokens, banned=(around,))
    monkeypatch.setattr(model, "config", msgspec.structs.replace(model.config, tokens=tokens))
    body = {"model": "nano", "prompt": "<image>Output: a", "images": [data_url(EXAMPLES / "a.png")]}
    found = client.post("/v1/completions", {**body, "max_tokens": 0, "echo": True, "logprobs": 1}).json
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<BOS>", "<image>", "Output", ":", " a"]
    assert [value is None for value in logprobs["token_logprobs"]] == [True, True, True, False, False]


def test_many_callers_get_what_one_gets(client: Client) -> None:
    names = [f"images/scene_{number}.png" for number in range(1, 9)]
    alone = {name: client.chat(messages=user(image_part(name))).json["choices"] for name in names}
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: (name, client.chat(messages=user(image_part(name))).json["choices"]), names * 4))
    for name, choices in found:
        assert choices == alone[name]


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


def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    page = client.get("/")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = page.raw.decode()
    for outside in ("http://", "https://", "//cdn", "@import", "url("):
        assert outside not in text


def test_the_description_names_every_route(client: Client) -> None:
    paths = client.get("/openapi.json").json["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models"} <= set(paths)


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
        ({"model": "nano", "messages": user("a"), "temperature": -1}, 400, "temperature"),
        ({"model": "nano", "messages": user("a"), "max_tokens": 100_000}, 400, "cache slots"),
        ({"model": "nano", "messages": user("word " * 5000)}, 400, "cache slots"),
        ({"model": "nano", "messages": user("a"), "beams": 2, "temperature": 1}, 400, "exclude"),
        ({"model": "nano", "messages": user("a"), "timeout": -1}, 400, "timeout"),
        ({"model": "nano", "messages": user("a"), "tools": [{}]}, 400, "tools"),
        ({"model": "nano", "messages": user("a"), "response_format": {"type": "xml"}}, 400, "response_format"),
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


def test_request_ids_come_back(client: Client) -> None:
    found = client.call("POST", "/v1/chat/completions", {"model": "x", "messages": []}, **{"x-request-id": "abc-1"})
    assert found.headers["x-request-id"] == "abc-1"
    other = client.call("POST", "/v1/chat/completions", {"model": "x", "messages": []}, **{"x-request-id": "a b"})
    assert other.headers["x-request-id"] != "a b"


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
            _until(lambda: server.active == 1)
            found = client.chat(messages=user(image_part()))
            assert (found.status, found.headers["retry-after"]) == (429, "1")
        _until(lambda: server.active == 0)
        assert client.chat(messages=user(image_part())).status == 200
    server.models.close()


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
        _until(lambda: engine.stats().running == 1)
        assert connection.sock is not None
        connection.sock.close()
        connection.close()
        _until(lambda: engine.stats().running == 0)
    assert engine.stats().cancelled == before + 2
    _until(lambda: client.server.active == 0)


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
    _until(lambda: client.server.active == 0)
    leave.set()
    _until(lambda: len(tickets) == 1 and tickets[0].done)
    with pytest.raises(CancelledError):
        tickets[0].result()


@pytest.mark.usefixtures("slow")
def test_a_deadline(client: Client) -> None:
    found = client.chat(messages=user(image_part()), timeout=0.1)
    assert (found.status, found.error["code"]) == (503, "deadline_exceeded")
    assert found.headers["retry-after"]


def test_a_server_that_stops_refuses_and_finishes(make_server: Callable[..., Server]) -> None:
    server = make_server()
    with running(server) as client:
        body = {"messages": user(image_part()), "temperature": 2.0, "n": 8, "max_tokens": 100, "seed": 1}
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(client.chat(**body).status))
        thread.start()
        _until(lambda: server.active == 1)
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


def _explode(*_: object, **__: Any) -> None:
    raise flamingo_export.errors.BackendError("secret path of the server")


def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)
