"""Where media may come from. The hosts here are sockets on the loopback address; only tests may speak to it."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from flamingo_export.errors import InputError
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.remote_media import MediaFetcher, decode_data_url, is_public


class Host(http.server.BaseHTTPRequestHandler):
    """Serves what `pages` says: a body, or where to go next."""

    pages: ClassVar[dict[str, bytes | str]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        Host.asked.append((self.headers["Host"], self.path))
        found = self.pages.get(self.path)
        if isinstance(found, str):
            self.send_response(302)
            self.send_header("Location", found)
            self.end_headers()
        elif found is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Host.pages, Host.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def fetcher(*allowed: str, most: int = 1000, seconds: float = 5.0) -> MediaFetcher:
    return MediaFetcher(
        allowed, most=most, seconds=seconds, resolve=lambda *_: ["127.0.0.1"], permitted=lambda address: address == "127.0.0.1"
    )


def refused(fetch: MediaFetcher, url: str) -> str:
    with pytest.raises(ApiError) as caught:
        fetch.get(url)
    assert caught.value.status in (400, 413)
    return caught.value.message


def test_data_urls() -> None:
    coded = base64.b64encode(b"picture").decode()
    assert fetcher().get(f"data:image/png;base64,{coded}") == b"picture"
    assert fetcher().get("data:,a%20b") == b"a b"
    assert decode_data_url(f"data:image/png;charset=x;base64,{coded}", most=7) == b"picture"


@pytest.mark.parametrize("url", ["data:image/png;base64,@@@@", "data:image/png;base64", "data:image/png;base64,abc"])
def test_broken_data_urls(url: str) -> None:
    assert "data: URL" in refused(fetcher(), url)


def test_a_large_data_url_is_refused_before_it_is_decoded() -> None:
    assert "larger than 6 bytes" in refused(fetcher(most=6), "data:;base64," + base64.b64encode(b"picture").decode())


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "ftp://a/b", "", "examples/a.png", "gopher://x", "http://images.example/a.png"]
)
def test_nothing_else_without_an_allow_list(url: str) -> None:
    assert "data: URLs" in refused(fetcher(), url)


def test_an_allowed_origin(port: int) -> None:
    Host.pages = {"/a.png?x=1": b"picture"}
    assert fetcher(f"http://images.example:{port}").get(f"http://images.example:{port}/a.png?x=1") == b"picture"
    assert Host.asked == [(f"images.example:{port}", "/a.png?x=1")]


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example:{port}/a.png",
        "http://images.example:1/a.png",
        "https://images.example:{port}/a.png",
        "http://images.example.evil.example:{port}/a.png",
        "http://images.example@evil.example:{port}/a.png",
        "http://user:secret@images.example:{port}/a.png",
        "http://images.example:{port}\\@evil.example/a.png",
        "http://images.example:{port}/a b.png",
        "http://images.example:99999/a.png",
        "http://[::1/a.png",
    ],
)
def test_other_origins_are_refused_without_a_connection(port: int, url: str) -> None:
    refused(fetcher(f"http://images.example:{port}"), url.format(port=port))
    assert Host.asked == []


def test_a_prefix_is_a_folder(port: int) -> None:
    Host.pages = {"/pictures/a.png": b"picture"}
    fetch = fetcher(f"http://images.example:{port}/pictures/")
    assert fetch.get(f"http://images.example:{port}/pictures/a.png") == b"picture"
    for path in ("/picturesque.png", "/other/a.png", "/pictures/../secret", "/pictures/%2e%2e/secret"):
        refused(fetch, f"http://images.example:{port}{path}")
    assert Host.asked == [(f"images.example:{port}", "/pictures/a.png")]


def test_each_redirect_is_checked(port: int) -> None:
    home = f"http://images.example:{port}"
    Host.pages = {
        "/a": "/b",
        "/b": b"picture",
        "/away": f"http://other.example:{port}/b",
        "/file": "file:///etc/passwd",
        "/round": "/round",
    }
    assert fetcher(home).get(f"{home}/a") == b"picture"
    assert "allows origins" in refused(fetcher(home), f"{home}/away")
    assert "http(s) URLs" in refused(fetcher(home), f"{home}/file")
    assert "redirects more than" in refused(fetcher(home), f"{home}/round")


def test_a_name_that_resolves_to_a_private_address(port: int) -> None:
    Host.pages = {"/a": b"secret"}
    fetch = MediaFetcher([f"http://images.example:{port}"], most=1000, seconds=5.0, resolve=lambda *_: ["8.8.8.8", "127.0.0.1"])
    assert "not public" in refused(fetch, f"http://images.example:{port}/a")
    assert Host.asked == []


def test_size_and_status(port: int) -> None:
    Host.pages = {"/large": bytes(2000)}
    home = f"http://images.example:{port}"
    assert "larger than 1000 bytes" in refused(fetcher(home), f"{home}/large")
    assert "status 404" in refused(fetcher(home), f"{home}/none")


def test_a_host_that_does_not_answer() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        home = f"http://images.example:{silent.getsockname()[1]}"
        assert "in time" in refused(fetcher(home, seconds=0.3), f"{home}/a")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::", "::127.0.0.1", "not an address",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("origin", ["images.example", "*", "", "ftp://a", "https://", "https://a/?q", "http://u@a"])
def test_an_origin_that_is_none(origin: str) -> None:
    with pytest.raises(InputError, match="is not an origin"):
        MediaFetcher([origin], most=1, seconds=1)
