"""Two replicas of nano on Ray Serve, for real: load, kill -9, overload, a new bundle; and files of requests on Ray Data.

make test-deploy
"""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flamingo_export.deploy.package import package

from .conftest import chat_body, free_port, post

pytest.importorskip("ray", reason="needs Ray in an environment of its own: make test-deploy")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.deploy, pytest.mark.slow]


class Fleet:
    """A generated folder that runs."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": "a1" * 32}
        self.process: subprocess.Popen[str] | None = None

    def start(self, bundle: Path) -> None:
        self.process = subprocess.Popen(
            [str(self.folder / "run"), str(bundle)],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("http://"), "it did not start"

    def update(self, bundle: Path) -> None:
        subprocess.run([str(self.folder / "run"), str(bundle)], env=self.environment, check=True, timeout=300)

    def replicas(self) -> list[int]:
        """Processes of replicas, of this fleet only."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if " ".join(_line(child)).startswith("ray::ServeReplica:flamingo:Replica")]

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def _line(process: Any) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def fleet(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder, port = tmp_path_factory.mktemp("ray") / "out", free_port()
    package(nano_bundle, "ray", folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"port": port, "model": "nano", "replicas_most": 2, "replica_cpus": 0.5, "rows": 2, "queue": 4, "threads": 1}
    settings |= {"max_body": 2 << 20, "held_bytes": 5 << 20, "held_requests": 60}
    (folder / "settings.json").write_text(json.dumps(settings))
    made = Fleet(folder, port)
    made.start(nano_bundle)
    yield made
    assert made.stop() == 0


class Load:
    """Clients that ask one after the other until they are told to stop."""

    def __init__(self, fleet: Fleet, picture: Callable[[int], bytes], clients: int, **settings: Any) -> None:
        self.answers: list[tuple[int, str]] = []
        self._stop = threading.Event()
        self._fleet, self._picture, self._settings = fleet, picture, settings
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def _client(self, number: int) -> None:
        while not self._stop.is_set():
            status, raw = post(self._fleet.port, chat_body(self._picture(number), **self._settings))
            self.answers.append((status, _text(status, raw)))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def answered_by(fleet: Fleet, picture: bytes) -> str | None:
    """The name of the replica that answers; None where none does."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{fleet.port}/v1/chat/completions",
        json.dumps(chat_body(picture, max_tokens=1)).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as found:
            return str(found.headers["x-flamingo-replica"])
    except urllib.error.HTTPError:
        return None


def _text(status: int, raw: bytes) -> str:
    if status != 200:
        return raw.decode(errors="replace")[:200]
    if raw.startswith(b"data: "):
        events = [part.removeprefix(b"data: ") for part in raw.split(b"\n\n") if part]
        assert events[-1] == b"[DONE]"
        bodies = [json.loads(event) for event in events[:-1]]
        faults = [body for body in bodies if "error" in body]
        if faults:
            return f"error: {faults[0]}"
        return "".join(choice["delta"].get("content") or "" for body in bodies for choice in body["choices"])
    return str(json.loads(raw)["choices"][0]["message"]["content"])


def test_replicas_answer_as_the_model_does(fleet, picture, nano_bundle):
    import flamingo_export

    with flamingo_export.load(nano_bundle, threads=1) as model:
        for number in range(3):
            expected = model.caption(picture(number), beams=1).text.strip()
            for settings in ({}, {"stream": True}):
                assert _text(*post(fleet.port, chat_body(picture(number), **settings))) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_loses_an_answer_when_a_replica_is_killed(fleet, picture, stream):
    with Load(fleet, picture, 3, stream=stream) as load:
        time.sleep(5)
        before = fleet.replicas()
        assert len(before) == 2
        # Pictures belong to one replica or the other.
        names = {answered_by(fleet, picture(number)) for number in range(12)}
        assert len(names) == 2
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        asked = 0
        while answered_by(fleet, picture(asked % 12)) in names:
            assert time.monotonic() - killed < 60, "no replacement answers"
            asked += 1
        assert len(fleet.replicas()) == 2
        time.sleep(2)
    statuses = Counter(status for status, _ in load.answers)
    assert set(statuses) == {200}, statuses
    assert len(load.answers) > 10
    texts = {text for _, text in load.answers}
    assert not [text for text in texts if "error" in text], texts
    assert len(texts) <= 3  # one for each client's picture


def test_overload_is_refused(fleet, picture):
    with Load(fleet, picture, 40) as load:
        time.sleep(8)
    statuses = Counter(status for status, _ in load.answers)
    assert set(statuses) == {200, 429}, statuses
    assert all("error" in json.loads(text) for status, text in load.answers if status == 429)
    assert post(fleet.port, chat_body(picture(0)))[0] == 200


def begun(fleet: Fleet, length: int) -> socket.socket:
    """A request that says how long its body is, and does not send it yet."""
    one = socket.create_connection(("127.0.0.1", fleet.port), 30)
    one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
    return one


def refusal(one: socket.socket) -> tuple[int, str | None]:
    """Status and Retry-After of an answer."""
    response = http.client.HTTPResponse(one)
    response.begin()
    assert "error" in json.loads(response.read())
    one.close()
    return response.status, response.getheader("retry-after")


def refused(fleet: Fleet, length: int) -> tuple[int, str | None]:
    """The refusal of a request that says how long its body is, once those before it are noticed."""
    end = time.monotonic() + 25
    while time.monotonic() < end:
        one = begun(fleet, length)
        if select.select([one], [], [], 2)[0]:
            return refusal(one)
        one.close()
    raise AssertionError("it is not refused")


def answers_again(fleet: Fleet, picture: Callable[[int], bytes]) -> None:
    """Once it is noticed that clients have gone."""
    end = time.monotonic() + 30
    while post(fleet.port, chat_body(picture(0)))[0] != 200:
        assert time.monotonic() < end, "places of clients that have gone are not free again"
        time.sleep(0.2)


@contextmanager
def trickling(connections: list[socket.socket], size: int) -> Iterator[None]:
    """More of each body meanwhile, up to so many bytes, at a pace that keeps its place."""
    ended = threading.Event()

    def send() -> None:
        for _ in range(size // 8192 - 1):
            if ended.wait(0.2):
                return
            for each in connections:
                each.sendall(b"x" * 8192)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_bodies_are_bounded_before_they_are_read(fleet, picture):
    """In Ray's proxy, which would read any number of any length. Clients that do not send what they announced give way to others."""
    assert refusal(begun(fleet, (2 << 20) + 1)) == (413, None)
    large = [begun(fleet, 2 << 20) for _ in range(2)]
    for each in large:
        each.sendall(b"x" * (7 << 18))
    with trickling(large, 1 << 18):
        assert refused(fleet, 2 << 20) == (503, "1")
    for each in large:
        each.close()
    answers_again(fleet, picture)
    idle = [begun(fleet, 1) for _ in range(70)]
    answers_again(fleet, picture)
    with urllib.request.urlopen(f"http://127.0.0.1:{fleet.port}/health/ready", timeout=30) as found:
        assert found.status == 200
    end = time.monotonic() + 20
    while len(answered := select.select(idle, [], [], 0)[0]) < 11 and time.monotonic() < end:
        time.sleep(0.2)
    assert len(answered) >= 11  # there are 60 places, and one was wanted by another
    assert {refusal(each) for each in answered} <= {(429, "1"), (503, "1")}
    for each in idle:
        each.close()
    answers_again(fleet, picture)


def test_a_new_bundle_rolls_out_under_load(fleet, picture, nano_bundle, tmp_path):
    import flamingo_export
    from flamingo_export.sources.choice import source_for_size

    other = tmp_path / "other.bundle"
    flamingo_export.build(source_for_size("nano", seed=5), out=other, parity="skip")
    old = set(fleet.replicas())

    def digest() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{fleet.port}/v1/models", timeout=60) as found:
            return str(json.loads(found.read())["data"][0]["flamingo"]["digest"])

    before = digest()
    with Load(fleet, picture, 2, max_tokens=8) as load:
        fleet.update(other)
        end = time.monotonic() + 120
        while any(pid in old for pid in fleet.replicas()):
            assert time.monotonic() < end, "old replicas stay"
            time.sleep(0.5)
    assert {status for status, _ in load.answers} == {200}, Counter(load.answers)
    assert digest() != before
    fleet.update(nano_bundle)


@pytest.mark.parametrize("program", ["run", "batch"])
def test_what_does_not_start_says_why(fleet, nano_bundle, picture, tmp_path, program):
    """In the last line, below what Ray has logged; what ran before serves on."""
    folder = tmp_path / "ray"
    package(nano_bundle, "ray", folder)
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}')
    line = [str(folder / program), str(nano_bundle)]
    if program == "batch":
        line += [
            "--requests",
            str(tmp_path / "in.jsonl"),
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "1",
            "--backend",
            "reference",
        ]
    else:
        settings = json.loads((fleet.folder / "settings.json").read_text())
        (folder / "settings.json").write_text(json.dumps(settings | {"device": "cuda"}))
        (folder / "secret").write_bytes((fleet.folder / "secret").read_bytes())
    done = subprocess.run(line, env=fleet.environment, capture_output=True, text=True, timeout=300, check=False)
    said = done.stderr.splitlines()[-1]
    reason = "no CUDA provider" if program == "run" else "PyTorch is not installed"
    assert (done.returncode, said.startswith(f"{program}: "), reason in said) == (1, True, True), done.stderr[-2000:]
    if program == "run":
        assert post(fleet.port, chat_body(picture(0)))[0] == 200
        fleet.update(nano_bundle)


def test_replicas_refuse_all_but_their_ingress(fleet):
    script = (
        "from flamingo_export.deploy.ray.start import connect; connect(); from ray import serve;"
        "handle = serve.get_deployment_handle('Replica', 'flamingo').options(stream=True);"
        "print(list(handle.answer.remote('guess', {}, b'')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=fleet.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode
    assert "replicas answer their ingress only" in done.stderr


def test_what_listens_where(fleet):
    """Clients' port is on loopback only, and no dashboard runs. Ray's own ports listen everywhere, and ask for a token."""
    processes = [psutil.Process(fleet.process.pid), *psutil.Process(fleet.process.pid).children(recursive=True)]
    heard = [
        each.laddr for process in processes for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in heard if address.port == fleet.port} == {"127.0.0.1"}
    assert 8265 not in {address.port for address in heard}
    script = "from flamingo_export.deploy.ray.start import connect; connect()"
    stranger = {**fleet.environment, "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(
        [sys.executable, "-c", script], env=stranger, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode, done.stdout
    assert "does not let this process in" in done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, picture: Callable[[int], bytes]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows: list[dict[str, Any]] = [{"id": str(n), "images": [f"{n % 6}.png"], "beams": 1 + n % 3} for n in range(29)]
    rows += [{"id": "missing", "images": ["none.png"]}]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_two_workers_give_what_one_machine_gives(fleet, files, nano_bundle, tmp_path, form):
    import flamingo_export
    from flamingo_export.serve.from_file import run_file

    requests = files / f"in.{form}"
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist([json.loads(line) for line in (files / "in.jsonl").open()]), requests)

    def batch() -> subprocess.CompletedProcess[str]:
        line = [str(fleet.folder / "batch"), str(nano_bundle), "--requests", str(requests), "--out", str(tmp_path / "out")]
        return subprocess.run(
            [*line, "--block", "4", "--threads", "1"],
            env=fleet.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    done = batch()
    assert (done.returncode, done.stdout.split(":")[0]) == (1, "30 requests, 1 failed"), done.stderr[-2000:]
    blocks = sorted((tmp_path / "out").glob("block-*.jsonl"))
    assert len(blocks) == 8
    found = {(record := json.loads(line))["id"]: record for path in blocks for line in path.open()}
    with flamingo_export.load(nano_bundle, threads=1) as model:
        run_file(model, files / "in.jsonl", tmp_path / "one.jsonl", {})
    expected = {(record := json.loads(line))["id"]: record for line in (tmp_path / "one.jsonl").open()}
    assert found.keys() == expected.keys()
    for name, record in expected.items():
        if "error" in record:
            assert "error" in found[name]
            continue
        assert found[name]["token_ids"] == record["token_ids"]
        assert found[name]["token_logprobs"] == pytest.approx(record["token_logprobs"], abs=1e-4)
    # A block that is missing is done again, what is there is left alone.
    stamps = {path: path.stat().st_mtime_ns for path in blocks}
    blocks[3].unlink()
    assert batch().returncode == 1
    changed = [path for path in blocks if path.stat().st_mtime_ns != stamps[path]]
    assert changed == [blocks[3]]
