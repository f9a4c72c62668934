"""`flamingo-export serve` as a process: what it prints, how it stops, how bundles are exchanged."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.cli.serve import chosen
from flamingo_export.errors import InputError
from flamingo_export.serve.app import Server
from flamingo_export.serve.models import named
from flamingo_export.serve.settings import ModelChoice, ServeSettings
from flamingo_export.sources.choice import source_for_size

from .conftest import image_part, user

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def accepted(port: int) -> bool:
    """Whether the engine has taken a request in."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        lines = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#"))
    running, tokens = lines['flamingo_requests_running{model="nano"}'], lines['flamingo_generated_tokens_total{model="nano"}']
    return float(running) > 0 or float(tokens) > 0


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "203.0.113.1", "a" * 80])
def test_an_address_that_cannot_be_listened_on(nano_bundle: Path, capfd: pytest.CaptureFixture[str], host: str) -> None:
    """Said before a bundle is opened, and with an exit code of ours."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(nano_bundle), "--host", host, "--port", str(port)]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"{host}, port {port}, cannot be listened on" in said
    assert "onnxruntime" not in said


def test_origins_are_checked_before_a_bundle_is_opened(nano_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(nano_bundle), "--port", str(free_port()), "--allow-media-from", "nonsense"]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "'nonsense' is not an origin" in said
    assert "onnxruntime" not in said


@pytest.fixture
def process(nano_bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of a copy of nano, ready."""
    shutil.copytree(nano_bundle, tmp_path / "nano.bundle")
    port = free_port()
    line = [sys.executable, "-c", "import sys; from flamingo_export.cli import main; sys.exit(main())"]
    line += ["serve", str(tmp_path / "nano.bundle"), "--port", str(port), "--threads", "1", "--rows", "4"]
    started = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while True:
            assert started.poll() is None, started.stderr.read() if started.stderr else ""
            assert time.monotonic() < end
            try:
                if ask(port, "GET", "/health/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield started, port
    finally:
        started.kill()
        started.wait()


def test_sigterm_finishes_what_was_accepted(process: tuple[subprocess.Popen[str], int]) -> None:
    started, port = process
    body = {"model": "nano", "messages": user(image_part()), "temperature": 1.5, "n": 4, "max_tokens": 60, "seed": 1}
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(port, "POST", "/v1/chat/completions", body)[0])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while not accepted(port):
        assert time.monotonic() < end
    started.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert started.wait(60) == 0
    # Accepted ones were answered; those that came later were told so, or found nobody listening any more.
    assert set(found) <= {200, 503}
    assert 200 in found
    assert started.stderr
    lines = [json.loads(line) for line in started.stderr.read().splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["message"] == "request"]
    assert len([line for line in requests if line["status"] == 200]) == found.count(200)
    assert all({"request_id", "caller", "seconds", "path"} <= set(line) for line in requests)


def test_sighup_opens_an_exchanged_bundle(process: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    started, port = process
    body = {"model": "nano", "messages": user(image_part())}
    before = ask(port, "POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    other = tmp_path / "other.bundle"
    flamingo_export.build(source_for_size("nano", seed=3), out=other, parity="skip")
    (tmp_path / "nano.bundle").rename(tmp_path / "old.bundle")
    other.rename(tmp_path / "nano.bundle")
    started.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while ask(port, "POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == before:
        assert time.monotonic() < end
        time.sleep(0.1)
    # A bundle that cannot be opened leaves the one that runs where it is.
    shutil.rmtree(tmp_path / "nano.bundle")
    started.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert ask(port, "POST", "/v1/chat/completions", body)[0] == 200


def test_every_option_of_the_command_reaches_the_server(
    nano_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Server] = []

    def noted(server: Server, sockets: list[socket.socket]) -> int:
        seen.append(server)
        for each in sockets:
            each.close()
        server.models.close()
        return 0

    monkeypatch.setattr("flamingo_export.serve.process.serve", noted)
    monkeypatch.setattr("flamingo_export.serve.process.set_up_logs", lambda: None)
    (tmp_path / "keys.txt").write_text(f"ann {'a' * 20}\n")
    port = free_port()
    line = ["serve", str(nano_bundle), "--name", f"b={nano_bundle}", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--api-key-file", str(tmp_path / "keys.txt"), "--rows", "3", "--max-queue", "5", "--threads", "1"]
    line += ["--allow-media-from", "https://images.example", "--max-per-caller", "2", "--max-body", "8", "--held-requests", "7"]
    line += ["--held-bodies", "16", "--timeout", "9", "--drain", "4", "--log-prompts"]
    assert main(line) == 0
    (server,) = seen
    assert [(served.name, served.model.engine.rows) for served in server.models] == [("nano", 3), ("b", 3)]
    assert server.settings == ServeSettings(
        port=port,
        rows=3,
        max_queue=5,
        max_per_caller=2,
        max_body=8 << 20,
        held_requests=7,
        held_bytes=16 << 20,
        allow_media_from=("https://images.example",),
        timeout=9.0,
        drain_seconds=4.0,
        log_prompts=True,
        keys={"ann": "a" * 20},
    )
    said = capfd.readouterr().err
    assert "nano: onnxruntime, 3 rows\nb: onnxruntime, 3 rows\n" in said
    assert f"http://127.0.0.1:{port}\n" in said
    assert "a" * 20 not in said


def test_names() -> None:
    choices = chosen([Path("a/nano.bundle"), Path("other")], ["x=b/nano.bundle"])
    assert [choice.name for choice in choices] == ["nano", "other", "x"]
    with pytest.raises(InputError, match="would both be called 'nano'"):
        named([*choices, ModelChoice(name="nano", bundle=Path("c/nano.bundle"))])
    with pytest.raises(InputError, match="no bundle was named"):
        named([])
