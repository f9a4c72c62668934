"""Bodies that are held at once, and bodies as large as a client says: counted before they are parsed, and refused before they are read."""

from __future__ import annotations

import json
import select
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from flamingo_export.cli import main
from flamingo_export.errors import InputError
from flamingo_export.serve.app import Server
from flamingo_export.serve.held import SLOW, WINDOW
from flamingo_export.serve.settings import ServeSettings

from .conftest import Client, image_part, running, until, user

MIB = 1 << 20
GIB = 1 << 30


@contextmanager
def begun(client: Client, *headers: str, path: str = "/v1/chat/completions") -> Iterator[socket.socket]:
    """A connection on which a request's head was sent, and nothing of its body."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as raw:
        raw.sendall("\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *headers, "", ""]).encode())
        yield raw


def answered(raw: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and error of what came back; the connection is closed by the server or by who calls."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += (piece := raw.recv(4096))
        assert piece, got
    head, body = got.split(b"\r\n\r\n", 1)
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += raw.recv(4096)
    return int(first.split()[1]), headers, json.loads(body)["error"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/score"])
def test_what_does_not_fit_beside_other_bodies_is_refused_unread(make_server: Callable[..., Server], path: str) -> None:
    server = make_server(ServeSettings(max_body=MIB, held_bytes=MIB + 1000))
    server.held.clock = lambda: 0.0  # nobody is slow
    with running(server) as client, ExitStack() as open_:
        open_.enter_context(begun(client, f"Content-Length: {MIB}")).sendall(b"x" * (MIB - 1))
        until(lambda: server.held.bytes == MIB - 1)
        with begun(client, "Content-Length: 1002", path=path) as raw:
            status, headers, error = answered(raw)
        assert (status, headers["retry-after"], error["code"]) == (503, "1", "bodies_full")
        assert headers["x-request-id"]
        assert client.post("/v1/score", {"model": "nano"}).status == 422  # a small one fits
        assert b'flamingo_refusals_total{reason="bodies_full"} 1.0' in client.get("/metrics").raw
        open_.close()
        until(lambda: (server.held.requests, server.held.bytes) == (0, 0))
        assert client.chat(messages=user(image_part())).status == 200
    server.models.close()


def test_a_body_counts_as_it_comes(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(max_body=2000, held_bytes=3000))
    server.held.clock = lambda: 0.0
    lengths = ("Content-Length: 2000", "Transfer-Encoding: chunked")
    with running(server) as client, begun(client, lengths[0]) as known, begun(client, lengths[1]) as raw:
        until(lambda: (server.held.requests, server.held.bytes) == (2, 0))
        known.sendall(b"x" * 1999)
        until(lambda: server.held.bytes == 1999)
        raw.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        until(lambda: server.held.bytes == 2999)
        raw.sendall(b"2\r\nxx\r\n")
        status, headers, _ = answered(raw)
        assert (status, headers["retry-after"]) == (503, "1")
        until(lambda: (server.held.requests, server.held.bytes) == (1, 1999))
    server.models.close()


def test_more_requests_than_are_held_come_back_later(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(held_requests=2))
    server.held.clock = lambda: 0.0
    with running(server) as client, ExitStack() as open_:
        for _ in range(2):
            open_.enter_context(begun(client, "Content-Length: 1"))
        until(lambda: server.held.requests == 2)
        found = client.chat(messages=user(image_part()))
        assert (found.status, found.error["code"], found.headers["retry-after"]) == (429, "queue_full", "1")
        assert client.get("/health/ready").status == client.get("/v1/models").status == 200
        open_.close()
        until(lambda: server.held.requests == 0)
        assert client.chat(messages=user(image_part())).status == 200
    server.models.close()


def test_bodies_that_are_announced_and_never_come_shut_nobody_out(make_server: Callable[..., Server]) -> None:
    """The default limits, no keys: as many announcements as would fill the bytes, and then as many as there are places."""
    server = make_server(ServeSettings(held_requests=6))
    now = 0.0
    server.held.clock = lambda: now
    with running(server) as client, ExitStack() as open_:
        idle = [open_.enter_context(begun(client, f"Content-Length: {64 * MIB}")) for _ in range(5)]
        until(lambda: server.held.requests == 5)
        assert server.held.bytes == 0
        assert client.chat(messages=user(image_part())).status == 200
        idle.append(open_.enter_context(begun(client, "Content-Length: 1")))
        until(lambda: server.held.requests == 6)
        assert client.chat(messages=user(image_part())).status == 429  # they may still send
        now += WINDOW
        assert client.chat(messages=user(image_part())).status == 200
        assert server.held.requests == 5
        ended = [raw for raw in idle if select.select([raw], [], [], 0)[0]]
        assert len(ended) == 1
        status, headers, error = answered(ended[0])
        assert (status, headers["retry-after"], error["code"]) == (503, "1", "body_too_slow")
    server.models.close()


def test_bodies_that_stop_half_way_give_way_to_others(make_server: Callable[..., Server]) -> None:
    """The one whose pace is least gives way first; one that comes fast enough, or is whole, does not."""
    server = make_server(ServeSettings(max_body=100_000, held_bytes=100_000))
    now = 0.0
    server.held.clock = lambda: now
    with running(server) as client, ExitStack() as open_:
        slow, stopped, fast = [open_.enter_context(begun(client, "Content-Length: 100000")) for _ in range(3)]
        until(lambda: server.held.requests == 3)
        for raw in (slow, stopped, fast):
            raw.sendall(b"x" * 25_000)
        until(lambda: server.held.bytes == 75_000)
        now += WINDOW
        for count, raw in ((SLOW - 1, slow), (1, stopped), (SLOW, fast)):  # measured from here on
            raw.sendall(b"x" * count)
        until(lambda: server.held.bytes == 75_000 + 2 * SLOW)
        now += WINDOW
        for count, raw in ((SLOW - 1, slow), (SLOW, fast)):
            raw.sendall(b"x" * count)
        until(lambda: server.held.bytes == 75_000 + 4 * SLOW - 1)
        other = open_.enter_context(begun(client, "Content-Length: 20000"))
        assert answered(stopped)[2]["code"] == "body_too_slow"
        until(lambda: server.held.requests == 3)
        other.sendall(b"x" * 19_999)
        until(lambda: server.held.bytes == 50_000 + 19_999 + 4 * SLOW - 2)
        another = open_.enter_context(begun(client, "Content-Length: 30000"))
        assert answered(slow)[2]["code"] == "body_too_slow"
        another.sendall(b"x" * 29_999)
        until(lambda: server.held.bytes == 25_000 + 19_999 + 29_999 + 2 * SLOW)
        with begun(client, "Content-Length: 30000") as raw:
            assert answered(raw)[2]["code"] == "bodies_full"
    server.models.close()


def test_a_body_without_a_key_holds_nothing(make_server: Callable[..., Server]) -> None:
    server = make_server(ServeSettings(keys={"ann": "a" * 20}, held_requests=1, max_body=MIB, held_bytes=MIB))
    with running(server) as client, begun(client, f"Content-Length: {MIB}") as stranger:
        assert answered(stranger)[0] == 401
        assert server.held.bytes == 0
        client.headers = {"authorization": "Bearer " + "a" * 20}
        assert client.chat(messages=user(image_part())).status == 200
    server.models.close()


def test_a_stream_lets_go_of_its_body_when_it_is_out(make_server: Callable[..., Server]) -> None:
    server = make_server()
    body = json.dumps({"model": "nano", "stream": True, "messages": user(image_part())}).encode()
    with running(server) as client, begun(client, f"Content-Length: {len(body)}") as raw:
        raw.sendall(body[:-1])
        until(lambda: server.held.bytes == len(body) - 1)
        raw.sendall(body[-1:])
        text = b""
        while b"[DONE]" not in text:
            text += raw.recv(4096)
        until(lambda: (server.held.requests, server.held.bytes) == (0, 0))
    server.models.close()


@contextmanager
def flat(most: int) -> Iterator[None]:
    """Python allocates no more than so many bytes beside what there is."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_gigabyte_that_is_announced_is_refused_before_it_comes(client: Client) -> None:
    with flat(MIB), begun(client, f"Content-Length: {GIB}") as raw:
        status, _, error = answered(raw)
        assert (status, error["code"]) == (413, "body_too_large")
        assert raw.recv(100) == b""  # the server reads no more
    assert client.server.held.bytes == 0


@pytest.mark.parametrize("length", [b"1073741824" * 3, b"9" * 400, b"+5", b"1_0", b"0x10", b"-1"])
def test_a_length_that_is_none_is_refused(client: Client, length: bytes) -> None:
    with begun(client, f"Content-Length: {length.decode()}") as raw:
        assert int(raw.recv(4096).split()[1]) in (400, 413)
    until(lambda: (client.server.held.requests, client.server.held.bytes) == (0, 0))


def test_a_gigabyte_that_streams_is_refused_where_it_is_too_large(make_server: Callable[..., Server]) -> None:
    """The client sends as long as the server takes it."""
    server = make_server(ServeSettings(max_body=4 * MIB, held_bytes=8 * MIB))
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with running(server) as client:
        client.get("/health/live")
        # A body of 4 MiB in pieces, and what the kernel and the server's reader hold of the next ones.
        with flat(12 * MIB), begun(client, "Transfer-Encoding: chunked") as raw:
            raw.setblocking(False)
            sent, answer, view = 0, b"", memoryview(b"")
            while sent < GIB and not answer:
                view = view or memoryview(piece)
                try:
                    view = view[(count := raw.send(view)) :]
                    sent += count
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    break
                with suppress(BlockingIOError):
                    answer = raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413")
        assert 4 * MIB < sent < 64 * MIB
        until(lambda: (server.held.requests, server.held.bytes) == (0, 0))
    server.models.close()


def test_settings_under_which_no_body_could_be_held(capfd: pytest.CaptureFixture[str]) -> None:
    for wrong in ({"held_requests": 0}, {"max_body": 100, "held_bytes": 99}):
        with pytest.raises(InputError, match="--held-bodies"):
            ServeSettings(**wrong)  # type: ignore[arg-type]
    assert main(["serve", "nothing.bundle", "--max-body", "64", "--held-bodies", "63"]) == 1
    assert "--max-body" in capfd.readouterr().err
