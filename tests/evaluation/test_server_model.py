"""A server as what is evaluated: what is sent, a server that is busy, one that is another. It answers from a script."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from flamingo_export.errors import CapacityError, EvaluationError
from flamingo_export.evaluation.server import ServerModel, data_url
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video
from flamingo_reference.input_format import PAPER

Reply = tuple[int, dict[str, str], bytes]
KNOWN = {"inputs": msgspec.to_builtins(PAPER), "digest": "d", "precision": "fp32", "backend": "onnxruntime", "parity": "passed"}
CARD: dict[str, Any] = {"id": "nano", "max_media": 4, "flamingo": KNOWN}
TEXT = {"choices": [{"text": " red ", "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5, -1]}}]}


def said(value: Any) -> Reply:
    return 200, {}, json.dumps(value).encode()


class Scripted:
    """Gives its replies one after the other; what it was sent is in `asked`: headers and body."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.asked: list[tuple[dict[str, str], Any]] = []
        self.port = 0

    def answer(self, *replies: Reply) -> None:
        self.replies += replies


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            script.asked.append(({name.lower(): value for name, value in self.headers.items()}, json.loads(raw or "null")))
            status, headers, body = script.replies.pop(0)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        script.port = listening.server_address[1]
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield script
        listening.shutdown()
        thread.join(20)


@pytest.fixture
def opened(scripted: Scripted) -> Callable[..., ServerModel]:
    def call(card: Any = CARD, **given: Any) -> ServerModel:
        scripted.answer(said({"data": [card]}))
        return ServerModel(f"http://127.0.0.1:{scripted.port}/v1", **given)

    return call


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for; none is."""
    found: list[float] = []
    monkeypatch.setattr("flamingo_export.evaluation.server.time.sleep", found.append)
    return found


def asked(*media: Any) -> Request:
    return Request(prompt="<image>" * len(media) + "What?", media=list(media))


def test_what_is_sent_and_what_is_read(scripted: Scripted, opened: Callable[..., ServerModel]) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    model = opened(api_key="secret")
    scripted.answer(said(TEXT))
    (found,) = model.generate([asked(pixels)], beams=3, max_new_tokens=7)
    assert (found.text, found.token_logprobs, found.finished) == ("red", (-0.5, -1.0), True)
    headers, body = scripted.asked[1]
    assert headers["authorization"] == scripted.asked[0][0]["authorization"] == "Bearer secret"
    assert {name: body[name] for name in ("model", "prompt", "beams", "max_tokens", "logprobs")} == {
        "model": "nano", "prompt": "<image>What?", "beams": 3, "max_tokens": 7, "logprobs": 1
    }  # fmt: skip
    (url,) = body["images"]
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
    assert model.identity == {"name": "nano", "digest": "d", "precision": "fp32", "backend": "onnxruntime", "parity": "passed"}
    assert model.inputs == PAPER
    opened()
    assert "authorization" not in scripted.asked[-1][0]


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"not looked at")
    assert data_url(path) == "data:image/jpeg;base64," + base64.b64encode(b"not looked at").decode()


def test_videos_are_refused() -> None:
    with pytest.raises(EvaluationError, match="evaluate the bundle itself"):
        data_url(Video(source="clip.mp4"))


def test_a_busy_server_is_asked_again_when_it_says(
    scripted: Scripted, opened: Callable[..., ServerModel], slept: list[float]
) -> None:
    model = opened()
    scripted.answer((429, {"retry-after": "3"}, b""), (503, {"retry-after": "1e9"}, b""), (503, {"retry-after": "soon"}, b""))
    scripted.answer((429, {"retry-after": "-1"}, b""), (429, {}, b""), said(TEXT))
    assert model.generate([asked()], beams=1, max_new_tokens=1)[0].text == "red"
    assert slept == pytest.approx([3, 30, 0.8, 1.6, 3.2])


def test_a_server_that_stays_busy_is_given_up(
    scripted: Scripted, opened: Callable[..., ServerModel], slept: list[float]
) -> None:
    model = opened()
    scripted.answer(*[(503, {}, b'{"error": {"message": "full"}}')] * 12)
    with pytest.raises(EvaluationError, match=r"/v1/completions answered 503: full$"):
        model.generate([asked()], beams=1, max_new_tokens=1)
    assert len(slept) == 11
    assert scripted.replies == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": {"message": "no such field"}}', "no such field"),
        (b"[]", r"\[\]"),
        (b"<html>" * 99, "(<html>){33}<h"),
        (b"", "Bad Request"),
    ],
)
def test_what_a_server_refuses(body: bytes, reason: str, scripted: Scripted, opened: Callable[..., ServerModel]) -> None:
    model = opened()
    scripted.answer((400, {}, body))
    with pytest.raises(EvaluationError, match=f"answered 400: {reason}$"):
        model.generate([asked()], beams=1, max_new_tokens=1)


def test_another_server_is_refused(opened: Callable[..., ServerModel]) -> None:
    with pytest.raises(EvaluationError, match="does not say what its bundle is"):
        opened({"id": "gpt"})
    with pytest.raises(EvaluationError, match=r"has the models nano; name one: --model NAME"):
        opened(model="other")


def test_the_longest_prompt_is_tried_and_too_many_media_are_not(scripted: Scripted, opened: Callable[..., ServerModel]) -> None:
    model = opened()
    model.check([], beams=1, max_new_tokens=1)
    pixels = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(CapacityError, match=r"shows 5 images, the server's media bank holds 4\. Give fewer shots"):
        model.check([asked(), asked(*[pixels] * 5)], beams=1, max_new_tokens=1)
    assert len(scripted.asked) == 1
    scripted.answer(said(TEXT))
    model.check([asked(), asked(pixels, pixels), asked(pixels)], beams=1, max_new_tokens=1)
    assert scripted.asked[1][1]["prompt"] == "<image><image>What?"
