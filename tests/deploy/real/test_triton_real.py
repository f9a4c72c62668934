"""nano behind the real Triton server, on loopback: HTTP and gRPC clients, streams, many in flight, a full queue, cancellation, an orderly end.

make test-deploy
"""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flamingo_export
from flamingo_export.deploy.package import package

from . import raw_protocols
from .conftest import free_port

grpcclient = pytest.importorskip("tritonclient.grpc", reason="needs Triton in an environment of its own: make test-deploy")
httpclient = pytest.importorskip("tritonclient.http")
pytest.importorskip("pytriton")
pytestmark = [pytest.mark.deploy, pytest.mark.slow]


class Triton:
    """A generated folder that runs."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.http, self.grpc, self.metrics = free_port(), free_port(), free_port()
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        environment |= {"HTTP_PORT": str(self.http), "GRPC_PORT": str(self.grpc), "METRICS_PORT": str(self.metrics)}
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [str(folder / "run"), str(bundle)], env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )
        end = time.monotonic() + 120
        while self.get("/v2/health/ready")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.5)

    def get(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http}{path}", timeout=30) as found:
                return found.status, found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def generate(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        """The `generate` extension: JSON in, JSON out."""
        asked = urllib.request.Request(f"http://127.0.0.1:{self.http}/v2/models/flamingo/generate", json.dumps(fields).encode())
        try:
            with urllib.request.urlopen(asked, timeout=120) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def triton(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton") / "out"
    package(nano_bundle, "triton", folder)
    config = folder / "repository" / "flamingo" / "config.pbtxt"
    text = config.read_text().replace('"rows" value: { string_value: "0"', '"rows" value: { string_value: "4"')
    text = text.replace('"threads" value: { string_value: "0"', '"threads" value: { string_value: "1"')
    config.write_text(text.replace("max_queue_size: 64", "max_queue_size: 6"))
    made = Triton(folder, nano_bundle)
    yield made
    made.process.send_signal(signal.SIGTERM)
    assert made.process.wait(60) == 0


@pytest.fixture(scope="module")
def model(nano_bundle: Path) -> Iterator[flamingo_export.Model]:
    with flamingo_export.load(nano_bundle, threads=1) as opened:
        yield opened


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def inputs(client: Any, prompt: str, images: list[bytes], **options: Any) -> list[Any]:
    """Tensors of one request, batched as Triton wants it."""
    made = []
    for name, values in (("prompt", [prompt.encode()]), ("images", images), ("options", [json.dumps(options).encode()])):
        tensor = client.InferInput(name, [1, len(values)], "BYTES")
        tensor.set_data_from_numpy(np.array([values], dtype=np.object_))
        made.append(tensor)
    return made


class Streamed:
    """A stream of gRPC, over which decoupled models answer."""

    def __init__(self, port: int) -> None:
        self.client = grpcclient.InferenceServerClient(f"127.0.0.1:{port}")
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.stop_stream()
        self.client.close()

    def ask(self, *request: Any, **options: Any) -> list[tuple[str, bool, str]]:
        """(text, final, result) of each response until the last."""
        self.client.async_stream_infer("flamingo", inputs(grpcclient, *request, **options))
        found = []
        while True:
            result, error = self.answers.get(timeout=120)
            if error is not None:
                raise error
            text, final, whole = (result.as_numpy(name).reshape(-1)[0] for name in ("text", "final", "result"))
            found.append((text.decode(), bool(final), whole.decode()))
            if final:
                return found


def test_http_answers_as_the_model_does(triton, model, picture):
    for number in range(3):
        image = picture(number)
        for options, expected in (
            ({"beams": 3, "num_return": 2}, model.caption(image, beams=3, num_return=2)),
            ({"question": "What colour is the square?"}, model.ask(image, "What colour is the square?", beams=1)),
        ):
            status, found = triton.generate(prompt="", images=[url(image)], options=json.dumps(options))
            assert (status, found["final"], found["text"]) == (200, True, expected.text)
            result = json.loads(found["result"])
            assert result["token_ids"] == list(expected.token_ids)
            assert result["token_logprobs"] == pytest.approx(expected.token_logprobs, abs=1e-4)
            assert [other["text"] for other in result["alternatives"]] == [other.text for other in expected.alternatives]


def test_grpc_streams_and_takes_several_images_as_files(triton, model, picture):
    images = [picture(1), picture(2)]
    prompt = "<image>Output: a red square<EOC><image>Output:"
    expected = model.generate(prompt, images=images, beams=1)
    with Streamed(triton.grpc) as stream:
        (only,) = stream.ask(prompt, images)
        assert only[0] == expected.text
        pieces = stream.ask(prompt, images, stream=True)
    assert len(pieces) > 2
    assert "".join(text for text, _, _ in pieces) == expected.text
    assert [final for _, final, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    assert json.loads(pieces[-1][2])["text"] == expected.text


def test_many_requests_are_in_flight_and_none_is_mixed_up(triton, model, picture):
    expected = [model.caption(picture(number), beams=1).text for number in range(8)]

    def client(number: int) -> list[str]:
        with Streamed(triton.grpc) as stream:
            return [stream.ask("", [picture(number)], stream=bool(turn % 2))[-1][2] for turn in range(4)]

    with ThreadPoolExecutor(8) as pool:
        for number, results in enumerate(pool.map(client, range(8))):
            assert {json.loads(result)["text"] for result in results} == {expected[number]}
    _, text = triton.get("/metrics", triton.metrics)
    done = re.search(rb'nv_inference_request_success\{model="flamingo",version="1"\} (\d+)', text)
    assert done
    assert int(done[1]) >= 32


def test_a_full_queue_refuses(triton, picture):
    body = {"prompt": "", "images": [url(picture(0))], "options": json.dumps({"beams": 8, "max_new_tokens": 64})}
    with ThreadPoolExecutor(60) as pool:
        statuses = Counter(status for status, _ in pool.map(lambda _: triton.generate(**body), range(120)))
    assert set(statuses) == {200, 503}, statuses
    assert triton.generate(**body)[0] == 200


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "", "images": []}, "about one image"),
        ({"prompt": "<image>", "images": []}, "<image> tag"),
        ({"prompt": "", "images": ["no image"]}, "image"),
        ({"prompt": "", "images": ["data:image/png;base64,AAAA"]}, "image"),
        ({"prompt": "hello", "images": [], "options": "{"}, "options"),
        ({"prompt": "hello", "images": [], "options": '{"beam": 3}'}, "beam"),
        ({"prompt": "hello", "images": [], "options": '{"timeout": -1}'}, "timeout"),
        ({"prompt": "hello " * 5000, "images": []}, "cache slots"),
    ],
)
def test_what_cannot_be_asked_is_a_client_error(triton, fields, text):
    status, found = triton.generate(**{"options": "", **fields})
    assert status == 400
    assert text in found["error"]
    assert "Traceback" not in found["error"]


def test_a_client_that_goes_frees_its_row(triton, picture):
    """Eight long requests are cancelled; the next one does not wait for them."""
    with Streamed(triton.grpc) as stream:
        for number in range(8):
            asked = inputs(grpcclient, "", [picture(number)], beams=8, max_new_tokens=200)
            stream.client.async_stream_infer("flamingo", asked)
        stream.client.stop_stream(cancel_requests=True)
    started = time.monotonic()
    assert triton.generate(prompt="", images=[url(picture(0))], options="")[0] == 200
    assert time.monotonic() - started < 20


def test_deadlines(triton, picture):
    status, found = triton.generate(
        prompt="", images=[url(picture(0))], options=json.dumps({"timeout": 1e-4, "beams": 8, "max_new_tokens": 200})
    )
    # Triton's `generate` makes every error of a model a 400; its text is ours.
    assert (status, "deadline" in found["error"]) == (400, True)


def test_shared_memory_and_the_repository_are_closed(triton):
    for path in ("/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status"):
        assert triton.get(path)[0] == 403
    client = httpclient.InferenceServerClient(f"127.0.0.1:{triton.http}")
    for call in (
        client.get_model_repository_index,
        lambda: client.load_model("flamingo"),
        lambda: client.unload_model("flamingo"),
    ):
        with pytest.raises(Exception, match="restricted"):
            call()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as other, pytest.raises(Exception, match="restricted"):
        other.register_system_shared_memory("a", "/a", 8)


def test_what_every_user_of_the_machine_can_read_opens_nothing(triton):
    """The header that would open them stands in the server's arguments, and cannot be sent: neither as it is nor in a form like it."""
    arguments = Path(f"/proc/{triton.process.pid}/cmdline").read_bytes().split(b"\0")
    (given,) = [each for each in arguments if each.startswith(b"--http-restricted-api=")]
    name, _, value = given.rpartition(b":")[2].partition(b"=")
    one, other = value.split(b"\n")
    path = "/v2/systemsharedmemory/status"
    for between in (b"\n", b"\r\n", b"\n ", b"\r\n ", b"\r\n\t", b"\r", b" ", b"%0a", b"\\n"):
        for separator in (b": ", b":"):
            answer = raw_protocols.http(triton.http, path, name + separator + one + between + other)
            assert not answer or answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), (between, answer)
    method, prefix = "/inference.GRPCInferenceService/SystemSharedMemoryStatus", b"triton-grpc-protocol-"
    for header in (prefix + name, prefix + name.lower(), prefix + name + b"-bin"):
        for sent in (value, value.replace(b"\n", b" "), one + other):
            assert raw_protocols.grpc(triton.grpc, method, [(header, sent)]) is None, (header, sent)
    # The same bytes reach what is open, so it is the header that they fail by.
    assert raw_protocols.http(triton.http, "/v2/health/live", b"X: y").startswith(b"HTTP/1.1 200")
    live = "/inference.GRPCInferenceService/ServerLive"
    assert raw_protocols.grpc(triton.grpc, live, [(prefix + b"x", b"y")]) == b"\0\0\0\0\2\x08\x01"


def test_it_listens_on_loopback_only(triton):
    psutil = pytest.importorskip("psutil")
    heard = psutil.Process(triton.process.pid).net_connections("inet")
    assert {each.laddr.ip for each in heard if each.status == psutil.CONN_LISTEN} <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_it_is_not_ready_without_a_bundle_that_answers(nano_bundle, tmp_path):
    """A bundle whose decoder is broken: the server ends with the reason, and never said that it was ready."""
    import shutil

    broken = tmp_path / "broken.bundle"
    shutil.copytree(nano_bundle, broken)
    (graph,) = broken.glob("decoder*.onnx")
    graph.write_bytes(b"not a graph")
    folder = tmp_path / "out"
    package(nano_bundle, "triton", folder)
    environment = {**os.environ, "PYTHON": sys.executable, "HTTP_PORT": str(free_port()), "GRPC_PORT": str(free_port())}
    done = subprocess.run(
        [str(folder / "run"), str(broken)],
        env={**environment, "METRICS_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode
    assert "decoder" in done.stdout + done.stderr


def test_a_client_sees_what_the_model_takes(triton):
    client = httpclient.InferenceServerClient(f"127.0.0.1:{triton.http}")
    found = client.get_model_metadata("flamingo")
    assert [each["name"] for each in found["inputs"]] == ["prompt", "images", "options"]
    assert [each["name"] for each in found["outputs"]] == ["text", "final", "result"]
    assert client.get_model_config("flamingo")["model_transaction_policy"]["decoupled"] is True
