"""What Triton's part is made of, without Triton: reading requests, senders, room, a client that goes, the server's arguments."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flamingo_export
from flamingo_export.deploy.triton import start
from flamingo_export.deploy.triton.backend import BUNDLE, Requests
from flamingo_export.errors import BackendError, BundleError
from flamingo_export.sources.choice import source_for_size


class Triton:
    """As much of triton_python_backend_utils as is used."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Logger = SimpleNamespace(log_error=print)

    class TritonError(Exception):
        CANCELLED, UNAVAILABLE, INVALID_ARG, INTERNAL = "cancelled", "unavailable", "invalid", "internal"

        def __init__(self, text: str, code: str) -> None:
            super().__init__(text, code)

    class Tensor:
        def __init__(self, name: str, value: np.ndarray[Any, Any]) -> None:
            self.name, self.value = name, value

        def as_numpy(self) -> np.ndarray[Any, Any]:
            return self.value

    class InferenceResponse:
        def __init__(self, output_tensors: Any, error: Any = None) -> None:
            self.outputs = {tensor.name: tensor.value.reshape(-1)[0] for tensor in output_tensors}
            self.error = error

    @staticmethod
    def get_input_tensor_by_name(request: Asked, name: str) -> Any:
        value = request.inputs.get(name)
        return None if value is None else Triton.Tensor(name, np.array([value], dtype=np.object_))


class Asked:
    """A request, and what was sent for it."""

    def __init__(self, prompt: str = "", images: list[bytes] | None = None, **options: Any) -> None:
        self.inputs: dict[str, Any] = {
            "prompt": [prompt.encode()],
            "images": images or [],
            "options": [json.dumps(options).encode()],
        }
        self.sent: list[tuple[Any, int]] = []
        self.gone = False
        self.ended = threading.Event()

    def get_response_sender(self) -> Asked:
        return self

    def send(self, response: Any, flags: int) -> None:
        self.sent.append((response, flags))
        if flags:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.gone

    def wait(self) -> Any:
        assert self.ended.wait(60)
        assert [flags for _, flags in self.sent] == [0] * (len(self.sent) - 1) + [1]
        return self.sent[-1][0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    return path


@pytest.fixture
def requests(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(BUNDLE, str(bundle))
    made = Requests(Triton)
    made.open({name: {"string_value": value} for name, value in (("rows", "2"), ("threads", "1"))})
    yield made
    made.close()


def png(colour: str) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def test_answers_whole_and_in_pieces(requests, bundle):
    with flamingo_export.load(bundle, threads=1) as model:
        expected = model.caption(png("red"), beams=1)
    whole, pieces = Asked(images=[png("red")]), Asked(images=[png("red")], stream=True)
    requests.take([whole, pieces])
    assert whole.wait().outputs["text"].decode() == expected.text
    assert len(whole.sent) == 1
    assert json.loads(pieces.wait().outputs["result"])["token_ids"] == list(expected.token_ids)
    assert b"".join(response.outputs["text"] for response, _ in pieces.sent).decode() == expected.text
    assert len(pieces.sent) > 1


def test_the_likeliest_tokens_are_in_the_result_where_they_were_asked_for(requests, bundle):
    with flamingo_export.load(bundle, threads=1) as model:
        expected = model.caption(png("red"), beams=1, top_logprobs=2)
    with_them, without = Asked(images=[png("red")], beams=1, top_logprobs=2), Asked(images=[png("red")], beams=1)
    requests.take([with_them, without])
    found = json.loads(with_them.wait().outputs["result"])
    assert [[token for token, _ in place] for place in found["top_logprobs"]] == [
        [token for token, _ in place] for place in expected.top_logprobs
    ]
    assert "top_logprobs" not in json.loads(without.wait().outputs["result"])


def test_pieces_are_the_text_together(requests, bundle):
    """Where a stop text is cut off, and where the best of several samples is known at the end."""
    with flamingo_export.load(bundle, threads=1) as model:
        text = model.caption(png("red"), beams=1).text
        within = text[len(text) // 2 :][:3]  # begins within a word
        asked: list[dict[str, Any]] = [{"beams": 1, "stop": within}]
        asked += [{"temperature": 2.0, "num_return": 3, "seed": seed} for seed in range(4)]
        expected = [model.caption(png("red"), **settings).text for settings in asked]
    for settings, wanted in zip(asked, expected, strict=True):
        pieces = Asked(images=[png("red")], stream=True, **settings)
        requests.take([pieces])
        pieces.wait()
        assert b"".join(response.outputs["text"] for response, _ in pieces.sent).decode() == wanted


def test_what_is_wrong_is_the_clients(requests):
    for asked, text in (
        (Asked(), "one image"),
        (Asked("a prompt", question="?"), "without a question"),
        (Asked("<image>"), "tag"),
        (Asked(images=[b"junk"]), "image"),
        (Asked(images=[b"data:image/png;base64,!"]), "data: URL"),
        (Asked("x", beam=3), "beam"),
        (Asked("x", timeout=0), "timeout"),
    ):
        requests.take([asked])
        message, code = asked.wait().error.args
        assert (code, text in message) == ("invalid", True), message
    asked = Asked("x", timeout=1e-6)
    requests.take([asked])
    assert asked.wait().error.args[1] == "unavailable"
    twice = Asked("x")
    twice.inputs["prompt"] = [b"x", b"y"]
    requests.take([twice])
    assert "expected one" in twice.wait().error.args[0]


def test_a_client_that_goes_is_given_up(requests):
    for stream in (False, True):
        asked = Asked("<image>" * 1, images=[png("blue")], stream=stream, beams=8, max_new_tokens=120)
        asked.gone = True
        requests.take([asked])
        assert asked.wait().error.args[1] == "cancelled"
    end = time.monotonic() + 10
    while requests._model.engine.stats().running and time.monotonic() < end:
        time.sleep(0.01)
    assert requests._model.engine.stats().running == 0


def test_without_room_the_next_ones_stay_in_tritons_queue(requests):
    with requests._model.engine.by_hand():  # nothing is answered meanwhile
        first = [Asked("x") for _ in range(4)]  # two rows, two that are read beside them
        requests.take(first)
        late = Asked("x")
        taking = threading.Thread(target=requests.take, args=([late],))
        taking.start()
        taking.join(0.3)
        assert taking.is_alive()
    taking.join(30)
    for asked in (*first, late):
        assert asked.wait().error is None


def test_a_fault_of_ours_tells_no_internals(requests, monkeypatch):
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(requests._model, "prepare", fails)
    asked = Asked("x")
    requests.take([asked])
    message, code = asked.wait().error.args
    assert code == "internal"
    assert "secret" not in message


def test_it_opens_what_the_environment_names(monkeypatch):
    monkeypatch.delenv(BUNDLE, raising=False)
    with pytest.raises(BundleError, match=BUNDLE):
        Requests(Triton).open({})


def test_the_server_is_found_or_named(monkeypatch, tmp_path):
    monkeypatch.setattr("flamingo_export.deploy.triton.start.shutil.which", lambda _: None)
    monkeypatch.setattr(start, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"25\.07"):
        start.server()
    home = tmp_path / "pytriton"
    for name in ("tritonserver/backends/python", "tritonserver/python_backend_stubs/3.8"):
        (home / name).mkdir(parents=True)
    monkeypatch.setattr(start, "find_spec", lambda _: SimpleNamespace(origin=str(home / "__init__.py")))
    monkeypatch.setattr(start, "version", lambda _: "2.1.0")
    with pytest.raises(BackendError, match="numpy is 2"):
        start.server()
    monkeypatch.setattr(start, "version", lambda _: "1.26.4")
    with pytest.raises(BackendError, match=r"has no stub for Python 3\.\d+. Use one of 3\.8"):
        start.server()
    line = start.command(Path("t"), None, Path("r"), 1, 2, 3)
    assert {argument.partition("=")[2] for argument in line if "-address" in argument} == {"127.0.0.1"}
    assert not any("backend-directory" in argument for argument in line)
    closed = [argument for argument in line if "shared-memory,model-repository" in argument]
    assert len(closed) == 2
    for argument in closed:
        name, _, value = argument.rpartition(":")[2].partition("=")
        assert name != name.lower(), "HTTP/2 must refuse the name"
        assert re.fullmatch(r"[0-9a-f]{32}\n[0-9a-f]{32}", value), "no header of HTTP has two lines"
    assert closed != [each for each in start.command(Path("t"), None, Path("r"), 1, 2, 3) if each[:7] == closed[0][:7]]
