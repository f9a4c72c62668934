"""What Ray's part is made of, without Ray: streams that another replica takes up, seeds, places, the ingress over replicas that die."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from flamingo_export.deploy.ray import blocks, ingress
from flamingo_export.deploy.ray.asgi import answered, scope_of
from flamingo_export.deploy.ray.failures import reason_of
from flamingo_export.deploy.ray.ingress import Ingress, Lost, Overloaded
from flamingo_export.deploy.ray.replay import DONE, Diverged, Replay
from flamingo_export.deploy.ray.requests import Passed, passed, ranked
from flamingo_export.deploy.ray.settings import RaySettings, read_settings
from flamingo_export.deploy.ray.start import _ENVIRONMENT, connect, secret_beside
from flamingo_export.errors import InputError


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chat(pieces: list[str], *, name: str = "a", index: int = 0, logprobs: bool = False, usage: bool = False) -> list[bytes]:
    """Events of a chat stream whose text comes in these pieces."""

    def chunk(delta: dict[str, Any], values: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "logprobs": values, "finish_reason": reason, "delta": delta}
        return event({"id": name, "object": "chat.completion.chunk", "created": len(name), "model": "m", "choices": [choice]})

    made = [chunk({"role": "assistant", "content": ""})]
    for text in pieces:
        values = {"content": [{"token": letter, "logprob": -1.0} for letter in text], "refusal": None} if logprobs else None
        made.append(chunk({"content": text}, values))
    made.append(chunk({}, None, "stop"))
    if usage:
        made.append(event({"id": name, "created": 1, "choices": [], "usage": {"total_tokens": 3}}))
    return [*made, DONE]


def read(events: list[bytes]) -> tuple[str, list[str], list[Any], set[str]]:
    """Text, tokens with log-probabilities, reasons and ids of what a client read."""
    bodies = [json.loads(each.removeprefix(b"data: ")) for each in events if each != DONE]
    choices = [choice for body in bodies for choice in body["choices"]]
    text = "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)
    tokens = [token["token"] for choice in choices if choice["logprobs"] for token in choice["logprobs"].get("content", [])]
    return text, tokens, [c["finish_reason"] for c in choices if c["finish_reason"]], {body["id"] for body in bodies}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("cut", range(7))
@pytest.mark.parametrize("second", [["a", "b", "c", "d", "e"], ["ab", "cde"], ["abcde"]])
def test_a_second_try_continues_where_the_first_was_cut(cut, second, logprobs):
    replay = Replay()
    sent = replay.push(b"".join(chat(["a", "bc", "de"], logprobs=logprobs, usage=True)[:cut]))
    replay.begin()
    data = b"".join(chat(second, name="other", logprobs=logprobs, usage=True))
    for start in range(0, len(data), 37):  # in pieces that respect no border
        sent += replay.push(data[start : start + 37])
    text, tokens, reasons, names = read(sent)
    assert (text, reasons, sent[-1], len(names)) == ("abcde", ["stop"], DONE, 1)
    assert tokens == (list("abcde") if logprobs else [])
    assert sum(b"total_tokens" in each for each in sent) == 1
    assert sum(b"assistant" in each for each in sent) == 1
    assert replay.finished


def test_completions_and_several_texts_continue_too():
    def text(index: int, piece: str, reason: str | None = None) -> bytes:
        return event(
            {"id": "x", "created": 1, "choices": [{"index": index, "text": piece, "logprobs": None, "finish_reason": reason}]}
        )

    first = [text(0, "on"), text(1, "tw"), text(0, "e", "stop")]
    replay = Replay()
    sent = replay.push(b"".join(first))
    replay.begin()
    sent += replay.push(b"".join([text(1, "two"), text(0, "one", "stop"), text(1, "!", "length"), DONE]))
    bodies = [json.loads(each.removeprefix(b"data: "))["choices"][0] for each in sent if each != DONE]
    assert ["".join(b["text"] for b in bodies if b["index"] == index) for index in (0, 1)] == ["one", "two!"]
    assert [b["finish_reason"] for b in bodies if b["finish_reason"]] == ["stop", "length"]


@pytest.mark.parametrize("second", [["axc"], ["a"], ["ab", "x"]])
def test_another_course_is_noticed(second):
    replay = Replay()
    replay.push(b"".join(chat(["a", "bc"])[:3]))
    replay.begin()
    with pytest.raises(Diverged):
        replay.push(b"".join(chat(second)))


def test_what_a_second_try_fails_with_is_said():
    """It is not another course."""
    replay = Replay()
    assert replay.push(b"".join(chat(["a ", "bird"])[:2]))
    replay.begin()
    said, done = replay.push(event({"error": {"message": "too late"}}) + DONE)
    assert b"too late" in said
    assert done == DONE
    assert replay.finished


def test_a_reader_that_goes_leaves_no_task():
    async def quiet(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def goes() -> None:
        pieces = answered(quiet, scope_of("GET", "/", b"", [], "caller"), b"")
        assert await anext(pieces) == (200, [])
        reading = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(goes())


def test_seeds_are_given_where_none_is():
    body = msgspec.json.encode({"model": "m", "temperature": 1})
    seeded = [json.loads(passed("/v1/completions", body).body)["seed"] for _ in range(20)]
    assert len(set(seeded)) > 15
    assert all(0 <= seed < 1 << 31 for seed in seeded)
    given = msgspec.json.encode({"seed": 0})
    assert passed("/v1/chat/completions", given).body == given
    assert passed("/v1/score", body).body == body
    assert [passed("/v1/completions", b'{"stream": %s}' % said).streams for said in (b"true", b"false", b"1")] == [
        True,
        False,
        False,
    ]
    for wrong in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        assert passed("/v1/completions", wrong) == Passed(body=wrong, streams=False, key="")


def test_requests_that_begin_alike_belong_together():
    def belongs_to(body: bytes) -> str:
        return passed("/v1/chat/completions", body).key

    def asked(image: str, text: str, **more: Any) -> bytes:
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
        return msgspec.json.encode({"messages": [{"role": "user", "content": parts}], **more})

    assert belongs_to(asked("data:1", "what?")) == belongs_to(asked("data:1", "where?")) != belongs_to(asked("data:2", "what?"))
    shots = [{"image": "data:s", "caption": "c"}, {"image": "data:t", "caption": "d"}]
    assert belongs_to(asked("data:1", "?", shots=shots)) == belongs_to(asked("data:2", "?", shots=shots[:1]))
    assert belongs_to(msgspec.json.encode({"prompt": "x" * 256 + "a"})) == belongs_to(
        msgspec.json.encode({"prompt": "x" * 256 + "b"})
    )
    assert belongs_to(b'{"messages": [3, {"content": []}]}') == ""


def test_a_replica_more_moves_few_requests():
    names = [f"replica-{number}" for number in range(8)]
    keys = [str(number) for number in range(2000)]
    before = [names[ranked(key, names)[0]] for key in keys]
    assert all(before.count(name) == pytest.approx(250, rel=0.3) for name in names)
    after = [[*names, "new"][ranked(key, [*names, "new"])[0]] for key in keys]
    moved = [one for one, other in zip(before, after, strict=True) if one != other]
    assert len(moved) == after.count("new") == pytest.approx(2000 / 9, rel=0.3)


class Replicas:
    """Tries in order: what each of them brings, an exception at the end where it fails."""

    def __init__(self, *tries: list[Any]) -> None:
        self.tries = list(tries)
        self.asked: list[tuple[dict[str, Any], bytes, str]] = []

    async def __call__(self, scope: dict[str, Any], body: bytes, key: str) -> AsyncIterator[Any]:
        self.asked.append((scope, body, key))
        for piece in self.tries.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece


HEAD = (200, [("content-type", "application/json")])
EVENTS = (200, [("content-type", "text/event-stream; charset=utf-8")])


def ask(replicas: Replicas, body: Any = None, *, path: str = "/v1/chat/completions", **settings: Any) -> tuple[int, bytes]:
    """Status and body of what the ingress answers."""

    async def run() -> tuple[int, bytes]:
        front = Ingress(replicas, RaySettings(model="m", **settings))
        raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        scope = scope_of("POST", path, b"", [("content-type", "application/json"), ("cookie", "secret")], "1.2.3.4")
        found = await front.respond(Request(scope, receive))
        if isinstance(found, StreamingResponse):
            return found.status_code, b"".join([each async for each in found.body_iterator if isinstance(each, bytes)])
        return found.status_code, bytes(found.body)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(ingress, "_PAUSE", 0)


def test_a_lost_answer_is_asked_for_again_with_the_same_seed():
    replicas = Replicas([Lost()], [HEAD, b'{"a":', Lost()], [HEAD, b'{"a": ', b"1}"])
    assert ask(replicas, {"temperature": 1}) == (200, b'{"a": 1}')
    bodies = {body for _, body, _ in replicas.asked}
    assert len(replicas.asked) == 3
    assert len(bodies) == 1
    assert b"seed" in next(iter(bodies))
    scope = replicas.asked[0][0]
    assert scope["client"] == ("1.2.3.4", 0)
    assert {name for name, _ in scope["headers"]} == {b"content-type", b"x-request-id"}


def test_a_broken_stream_continues_or_says_that_it_cannot():
    whole = chat(["a", "bc", "de"])
    status, raw = ask(Replicas([EVENTS, *whole[:2], Lost()], [EVENTS, *chat(["abcde"], name="b")]), {"stream": True})
    assert status == 200
    assert read([part + b"\n\n" for part in raw.split(b"\n\n") if part])[0] == "abcde"
    _, raw = ask(Replicas([EVENTS, *whole[:3], Lost()], [EVENTS, *chat(["xyz"])]), {"stream": True})
    assert b"continues differently" in raw
    assert raw.endswith(DONE)
    _, raw = ask(Replicas([EVENTS, *whole[:3]], [Lost()]), {"stream": True}, retries=1)  # it ended without an end
    assert b"no other could take over" in raw
    _, raw = ask(Replicas([EVENTS, *whole[:3], Lost()], [Overloaded()]), {"stream": True})
    assert b"have no room" in raw


def test_refusals_of_the_ingress(tmp_path):
    assert ask(Replicas([Overloaded()]))[0] == 429
    assert ask(Replicas([Lost()], [Lost()]), retries=1)[0] == 503
    assert ask(Replicas(), b"x" * 100, max_body=50)[0] == 413
    assert ask(Replicas(), path="/metrics")[0] == 404
    assert json.loads(
        ask(Replicas([(400, [("content-type", "application/json")]), b'{"error": {}}']), {"stream": True})[1]
    ) == {"error": {}}
    (tmp_path / "keys").write_text("someone 0123456789abcdef\n")
    assert ask(Replicas(), api_key_file=str(tmp_path / "keys"))[0] == 401


def test_an_application_is_run_and_told_when_the_reader_goes():
    told = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await receive()
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": body["body"], "more_body": True})
        told.append((await receive())["type"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def run() -> Any:
        pieces: Any = answered(app, scope_of("GET", "/", b"", [], ""), b"hello")
        found = [await anext(pieces), await anext(pieces)]
        await pieces.aclose()
        return found

    assert asyncio.run(run()) == [(201, [("x", "y")]), b"hello"]

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    async def consume() -> None:
        async for _ in answered(fails, scope_of("GET", "/", b"", [], ""), b""):
            pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(consume())


def test_an_empty_secret_is_none(tmp_path):
    """A process that died while it wrote the file; replicas would answer anybody who gives none."""
    settings = tmp_path / "settings.json"
    assert secret_beside(settings) == secret_beside(settings) == (tmp_path / "secret").read_text()
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "secret").write_text("")
    with pytest.raises(InputError, match="Remove it"):
        secret_beside(settings)


def test_the_reason_of_a_process_that_failed():
    ours = "ray::Replica\n  File x\nRuntimeError: y\nflamingo_export.errors.BundleError: b is damaged.\nBuild it again.\n"
    assert reason_of("flamingo_export.errors.InputError: other\n" + ours) == "b is damaged.\nBuild it again."
    assert (
        reason_of("Traceback\n  File x\nValueError: no flamingo_export.errors.X: here\n")
        == "ValueError: no flamingo_export.errors.X: here"
    )
    assert reason_of("File x\nImportError: no name y\n\nTo change retry attempts, configure it.") == "ImportError: no name y"
    assert (reason_of(""), reason_of("a\nb")) == ("", "b")


def test_settings_say_what_is_wrong(tmp_path):
    file = tmp_path / "settings.json"
    for content, text in (
        ("{", "not a settings file"),
        ('{"model": "m", "replica": 1}', "replica"),
        ('{"model": "m", "replicas_least": 3}', "replicas_least"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=text):
            read_settings(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(tmp_path / "none")


def test_blocks_cover_a_file_once_and_belong_to_one_run(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"id": 1}\n\n{"id": \r 2}\n  \n{"id": 3}')
    found = blocks.cut(file, 2)
    assert [(block.first, block.count) for block in found] == [(0, 2), (2, 1)]
    assert [json.loads(line)["id"] for block in found for line in block.read(file)] == [1, 2, 3]
    out = tmp_path / "out"
    blocks.claim(out, blocks.identity_of(file, "digest", 2))
    found[0].path(out).touch()
    blocks.claim(out, blocks.identity_of(file, "digest", 2))
    with pytest.raises(InputError, match="block differ"):
        blocks.claim(out, blocks.identity_of(file, "digest", 3))
    file.write_bytes(b"\n")
    with pytest.raises(InputError, match="no requests"):
        blocks.cut(file, 2)
    for reads in (lambda: blocks.cut(tmp_path / "none", 2), lambda: blocks.identity_of(tmp_path / "none", "digest", 2)):
        with pytest.raises(InputError, match="cannot be read"):
            reads()


def test_a_run_without_results_does_not_hold_its_folder(tmp_path):
    """A file that could not be read, mended and tried again."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out"
    for text in ("{", '{"id": 1}'):
        file.write_text(text)
        blocks.claim(out, blocks.identity_of(file, "digest", 2))
    (out / "block-000000.jsonl").touch()
    file.write_text('{"id": 2}')
    with pytest.raises(InputError, match="requests differ"):
        blocks.claim(out, blocks.identity_of(file, "digest", 2))


def test_a_block_reads_its_own_bytes_only(tmp_path):
    """Whatever else is in the file is not looked at: a hundred blocks read the file once, not fifty times."""
    file = tmp_path / "in.jsonl"
    made = [json.dumps({"id": number, "prompt": "x" * (number % 7)}).encode() + b"\n" for number in range(1000)]
    file.write_bytes(b"".join(made))
    found = blocks.cut(file, 10)
    assert [(one.end, one.first + one.count) for one in found[:-1]] == [(other.start, other.first) for other in found[1:]]
    assert sum(block.end - block.start for block in found) == file.stat().st_size
    for block in found:
        own = b"".join(made[block.first : block.first + block.count])
        file.write_bytes(b"\0" * block.start + own)
        assert b"".join(line + b"\n" for line in block.read(file)) == own
    file.write_bytes(b"".join(made[1:]))
    with pytest.raises(InputError, match="has changed"):
        [block.read(file) for block in found]


def test_a_parquet_file_is_read_once(tmp_path, monkeypatch):
    """Its rows become lines that every block finds by their place; what is null was not said."""
    read = []

    def rows(path: Path) -> Any:
        read.append(path)
        yield from (b'{"id": %d}' % number for number in range(5))

    monkeypatch.setattr(blocks, "rows", rows)
    file = tmp_path / "in.parquet"
    file.touch()
    for _ in range(3):
        lines = blocks.as_json_lines(file, tmp_path)
        got = [json.loads(line)["id"] for block in blocks.cut(lines, 2) for line in block.read(lines)]
        assert (got, read) == ([0, 1, 2, 3, 4], [file])
    blocks.finished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]
    assert blocks.as_json_lines(tmp_path / "in.jsonl", tmp_path) == tmp_path / "in.jsonl"


@pytest.mark.parametrize("said", [None, "1"])
def test_a_cluster_that_is_started_reports_to_nobody_and_shows_nothing(monkeypatch, said):
    """Unless its operator says otherwise. What is asked for stands in the environment before Ray is imported and started."""
    asked: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        asked.append({**settings, "reports": os.environ["RAY_USAGE_STATS_ENABLED"], "auth": os.environ["RAY_AUTH_MODE"]})
        if "address" in settings:
            raise ConnectionError("Could not find any running Ray instance.")

    for name in ("RAY_ADDRESS", *_ENVIRONMENT):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    if said is not None:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", said)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    assert connect()
    assert [each["reports"] for each in asked] == [said or "0"] * 2
    assert asked[0]["address"] == "auto"
    started = asked[1]
    assert (started["include_dashboard"], started["dashboard_host"], started["auth"]) == (False, "127.0.0.1", "token")
    assert started["_node_ip_address"] == "127.0.0.1"
