"""Random requests of every kind from many clients at once, some of which leave: each is answered as it is when nothing else runs.

FLAMINGO_REQUESTS says how many; docs/figures.md has how far that was run.
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from flamingo_export.serve.app import Server
from flamingo_export.serve.settings import ServeSettings

from .conftest import Client, running
from .random_requests import Asked, Kinds

REQUESTS = int(os.environ.get("FLAMINGO_REQUESTS", "400"))
POOL = min(400, REQUESTS // 4)
"""Different requests, each of which is asked alone once and among others several times."""
CLIENTS, ROWS, QUEUE = 18, 6, 10
LEAVING = 0.15
LIMIT = 1e-4
"""By which log-probabilities may differ, as in the other tests of nano's."""


@dataclass
class Found:
    """An answer, whole or put together from a stream: status, code of an error, and a (text, reason, tokens) of each choice."""

    status: int
    code: str | None = None
    choices: list[tuple[str, str | None, list[Any]]] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)


def tokens_of(logprobs: Any) -> list[tuple[str, float | None, list[float]]]:
    """Tokens with their log-probabilities, and those of the likeliest, in either of OpenAI's forms."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            (each["token"], each["logprob"], [top["logprob"] for top in each["top_logprobs"]]) for each in logprobs["content"]
        ]
    tops = logprobs["top_logprobs"] or [{}] * len(logprobs["tokens"])
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    return [(token, value, sorted(top.values(), reverse=True)) for token, value, top in rows]


def read(status: int, raw: bytes, streamed: bool) -> Found:
    if status != 200:
        return Found(status, json.loads(raw)["error"]["code"])
    if not streamed:
        answer = json.loads(raw)
        if "scores" in answer:
            return Found(status, scores=[each["token_logprobs"] for each in answer["scores"]])
        return Found(
            status,
            choices=[
                (
                    each["message"]["content"] if "message" in each else each["text"],
                    each["finish_reason"],
                    tokens_of(each["logprobs"]),
                )
                for each in answer["choices"]
            ],
        )
    texts: dict[int, str] = collections.defaultdict(str)
    reasons: dict[int, str] = {}
    tokens: dict[int, list[Any]] = collections.defaultdict(list)
    events = [part.removeprefix("data: ") for part in raw.decode().split("\n\n") if part]
    assert events[-1] == "[DONE]"
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            return Found(503 if event["error"]["type"] == "server_error" else 400, event["error"]["code"])
        for each in event["choices"]:
            index = each["index"]
            texts[index] += each["text"] if "text" in each else each["delta"].get("content") or ""
            tokens[index] += tokens_of(each["logprobs"])
            reasons[index] = each["finish_reason"] or reasons.get(index, "")
    return Found(status, choices=[(texts[index], reasons[index], tokens[index]) for index in sorted(texts)])


def verdict(asked: Asked, found: Found) -> str:
    """How an answer among others compares with the one alone: same, tie, or what is wrong."""
    alone: Found = asked.alone
    if (found.status, found.code) != (alone.status, alone.code):
        if asked.status == 0 and {found.status, alone.status} == {200, 503}:
            return "same"
        return f"status {found.status} {found.code}, alone {alone.status} {alone.code}"
    if found.scores or alone.scores:
        values = [np.asarray(each.scores[0] + each.scores[1] + each.scores[2], float) for each in (found, alone)]
        return "same" if values[0].shape == values[1].shape and close(*values) else "scores differ"
    mine, theirs = found.choices, alone.choices
    if asked.search == "drawn":  # a stream has them as they were drawn, a whole answer the likeliest first
        mine, theirs = sorted(mine, key=lambda each: each[:2]), sorted(theirs, key=lambda each: each[:2])
    if len(mine) != len(theirs):
        return "another number of choices"
    tie = False
    for one, other in zip(mine, theirs, strict=True):
        names = [[token for token, _, _ in each[2]] for each in (one, other)]
        values = [np.asarray([value for _, value, _ in each[2] if value is not None]) for each in (one, other)]
        if one[:2] == other[:2] and names[0] == names[1]:
            if not close(*values):
                return f"log-probabilities differ: {values}"
            continue
        place = next((place for place, (a, b) in enumerate(zip(*names, strict=False)) if a != b), None)
        top = other[2][place][2] if place is not None else []
        longest = max(len(each) for each in names)
        near_tokens = asked.search == "greedy" and len(top) > 1 and top[0] - top[1] <= LIMIT
        near_texts = asked.search == "beams" and abs(values[0].sum() - values[1].sum()) <= LIMIT * longest
        if near_tokens or near_texts:
            tie = True
        else:
            return f"{one[:2]} {names[0]}, alone {other[:2]} {names[1]}"
    return "tie" if tie else "same"


def close(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=0, atol=LIMIT))


class Crowd:
    """Clients, each in a thread, that take requests from one count until it is used up."""

    def __init__(self, port: int, pool: list[Asked], say: Callable[[str], None]) -> None:
        """say: prints how far they are."""
        self.port, self.pool, self.say = port, pool, say
        self.became: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._left, self._lock = REQUESTS, threading.Lock()

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with self._lock:
                if self._left == 0:
                    return
                self._left -= 1
            index = rng.randrange(len(self.pool))
            try:
                became = self.one(rng, self.pool[index])
            except BaseException as error:
                became = f"{type(error).__name__}: {error}"
            with self._lock:
                if became not in ("same", "tie", "left"):
                    self.wrong.append(f"request {index}, {self.pool[index].body!r:.400}: {became}")
                    became = "wrong"
                self.became[became] += 1
                done = sum(self.became[name] for name in ("same", "tie", "left", "wrong"))
            if done % 1000 == 0:
                self.say(f"{done} of {REQUESTS}: {dict(self.became)}")

    def one(self, rng: random.Random, asked: Asked) -> str:
        streamed = asked.streams and rng.random() < 0.5
        leaves = rng.random() < LEAVING
        raw = (
            json.dumps(asked.body | ({"stream": True} if streamed else {})).encode()
            if isinstance(asked.body, dict)
            else asked.body
        )
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
            try:
                connection.request("POST", asked.path, raw, {"content-type": "application/json"})
                if leaves:
                    select.select([connection.sock], [], [], rng.choice([0, 0.01, 0.1, 0.5]))
                    if rng.random() < 0.5:
                        connection.sock.recv(rng.choice([1, 300]))
                    return "left"
                answer = connection.getresponse()
                status, body = answer.status, answer.read()
            finally:
                connection.close()
            if status != 429:
                return verdict(asked, read(status, body, streamed and status == 200))
            assert answer.headers["Retry-After"]
            with self._lock:
                self.became["refused, and asked again"] += 1
            time.sleep(rng.uniform(0.02, 0.2))


def ask_alone(client: Client, asked: Asked) -> None:
    """What it gets when nothing else runs, which has to be as it was asked for."""
    answer = client.post(asked.path, asked.body)
    asked.alone = found = read(answer.status, answer.raw, False)
    assert found.status == asked.status or (asked.status == 0 and found.status in (200, 503)), (asked.body, answer.raw)
    for text, _, _ in found.choices:
        assert asked.wanted(text), (asked.body, text)
        stops = asked.body.get("stop", [])
        assert not any(stop in text for stop in stops)
    if asked.search == "drawn" and found.choices and isinstance(asked.body.get("messages", ""), list):
        assert len(found.choices) == asked.body.get("n", 1)


@pytest.mark.slow
def test_each_is_answered_as_it_is_alone(make_server: Callable[..., Server], capsys: pytest.CaptureFixture[str]) -> None:
    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    kinds = Kinds(random.Random(0))
    pool = [kinds.one() for _ in range(POOL)]
    server = make_server(ServeSettings())
    with running(server) as client:
        for asked in pool:
            ask_alone(client, asked)
    server.models.close()
    server = make_server(ServeSettings(max_queue=QUEUE), rows=ROWS)
    with running(server) as client:
        crowd = Crowd(client.port, pool, say)
        threads = [threading.Thread(target=crowd.client, args=(seed,), daemon=True) for seed in range(CLIENTS)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        (served,) = server.models
        end = time.monotonic() + 30
        while server.active and time.monotonic() < end:  # those whose clients have left
            time.sleep(0.05)
        stats = served.model.engine.stats()
        left = (server.active, served.active, stats.running, stats.waiting, stats.rows_in_use, stats.bank_rows_in_use)
    server.models.close()
    say(
        f"{REQUESTS} requests of {POOL} kinds, {CLIENTS} clients, {ROWS} rows, {seconds:.0f} s: {dict(crowd.became)}; "
        f"in the engine {stats.finished} finished, {stats.cancelled} cancelled, {stats.failed} past their deadline"
    )
    assert not crowd.wrong, "\n".join(crowd.wrong[:20])
    assert sum(crowd.became[name] for name in ("same", "tie", "left")) == REQUESTS
    assert left == (0, 0, 0, 0, 0, 0)
    assert not any(row.busy for row in served.model.engine.loop.cache.rows)
    assert crowd.became["same"] > REQUESTS / 2
    assert min(stats.finished, stats.cancelled) > 0
