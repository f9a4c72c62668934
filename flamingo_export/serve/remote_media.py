"""Media of requests: data: URLs, and remote ones from places that the operator allows.

A remote medium is fetched only from an allowed origin. Each redirect is checked as the first address is. A name is resolved once, every
address must be public, and the connection goes to the address that was checked. Nothing ever names a file of this machine.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from flamingo_export.errors import InputError
from flamingo_export.serve.refusals import ApiError

if TYPE_CHECKING:
    import urllib3

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_HOPS = 4
_PIECE = 1 << 16
_PORTS = {"http": 80, "https": 443}
Resolve = Callable[[str, int], Sequence[str]]


def decode_data_url(url: str, *, most: int) -> bytes:
    """The bytes of a data: URL, at most `most` of them. Raises ApiError."""
    head, comma, data = url[len("data:") :].partition(",")
    if not comma:
        raise _bad("a data: URL has no comma before its data")
    if head.split(";")[-1].strip().lower() == "base64":
        if len(data) * 3 // 4 > most + 2:
            raise ApiError(413, f"a medium is larger than {most} bytes", param="messages", code="media_too_large")
        try:
            found = base64.b64decode(unquote_to_bytes(data), validate=True)
        except (binascii.Error, ValueError):
            raise _bad("the base64 of a data: URL cannot be decoded") from None
    else:
        found = unquote_to_bytes(data)
    if len(found) > most:
        raise ApiError(413, f"a medium is larger than {most} bytes", param="messages", code="media_too_large")
    return found


class MediaFetcher:
    """Bytes of media by their URLs. Blocking: call it from a worker thread."""

    def __init__(
        self,
        allowed: Sequence[str],
        *,
        most: int,
        seconds: float,
        resolve: Resolve | None = None,
        permitted: Callable[[str], bool] | None = None,
    ) -> None:
        """allowed: origins or URL prefixes. most: bytes of a medium. seconds: of fetching one.

        resolve, permitted: how names become addresses, and which addresses may be spoken to; public ones, unless a test says otherwise.
        Raises InputError for what is not a URL prefix of http or https.
        """
        self._allowed = [_prefix(text) for text in allowed]
        self._most, self._seconds = most, seconds
        self._resolve = resolve or _addresses
        self._permitted = permitted or is_public

    def check(self, url: str) -> None:
        """Raises ApiError for a URL that would never be fetched. Nothing is fetched or decoded yet."""
        if url[:5].lower() != "data:":
            self._remote(url)

    def get(self, url: str) -> bytes:
        """The medium's bytes. Raises ApiError."""
        if url[:5].lower() == "data:":
            return decode_data_url(url, most=self._most)
        end = time.monotonic() + self._seconds
        for _ in range(_MAX_HOPS + 1):
            found = self._hop(self._remote(url), end)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise _bad(f"the medium's URL redirects more than {_MAX_HOPS} times")

    def _remote(self, url: str) -> SplitResult:
        """The parts of a URL that may be fetched."""
        if url.partition(":")[0].lower() not in _PORTS:
            raise _bad("media are given as data: URLs" + (", or http(s) URLs" if self._allowed else ""))
        if not self._allowed:
            raise _bad(
                "this server does not fetch media from URLs; send them as data: URLs, or start it with --allow-media-from ORIGIN"
            )
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _bad("the medium's URL cannot be read") from None
        host = (parts.hostname or "").rstrip(".")
        if parts.username is not None or parts.password is not None or "\\" in url or any(ord(c) <= 32 for c in url):
            raise _bad("the medium's URL holds a user name, blanks or control characters")
        for scheme, allowed_host, allowed_port, path in self._allowed:
            same = (parts.scheme, host, port) == (scheme, allowed_host, allowed_port)
            if same and _below(parts.path or "/", path):
                return parts
        raise _bad("this server does not fetch media from there; its operator allows origins with --allow-media-from")

    def _hop(self, parts: SplitResult, end: float) -> bytes | str:
        """The body, or where it redirects to."""
        import urllib3

        host = (parts.hostname or "").rstrip(".")
        port = parts.port or _PORTS[parts.scheme]
        try:
            addresses = self._resolve(host, port)
        except OSError:
            raise _bad("the medium's host is not known") from None
        if not addresses or not all(self._permitted(address) for address in addresses):
            raise _bad("the medium's host has an address that is not public")
        left = end - time.monotonic()
        if left <= 0:
            raise _late()
        pool = _pool(parts.scheme, host, addresses[0], port, left)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        name = f"[{host}]" if ":" in host else host
        shown = name if port == _PORTS[parts.scheme] else f"{name}:{port}"
        try:
            answer = pool.urlopen(
                "GET",
                target,
                headers={
                    "Host": shown,
                    "Accept": "image/*,video/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": "flamingo-export",
                },
                redirect=False,
                retries=False,
                preload_content=False,
                assert_same_host=False,
            )
            if answer.status in _REDIRECTS and "location" in answer.headers:
                return str(answer.headers["location"])
            if answer.status != 200:
                raise _bad(f"the medium's host answered with status {answer.status}")
            return self._body(answer, end)
        except urllib3.exceptions.TimeoutError:
            raise _late() from None
        except urllib3.exceptions.HTTPError:
            raise _bad("the medium could not be fetched") from None
        finally:
            pool.close()

    def _body(self, answer: urllib3.response.BaseHTTPResponse, end: float) -> bytes:
        pieces, size = [], 0
        for piece in answer.stream(_PIECE, decode_content=False):
            size += len(piece)
            if size > self._most:
                raise ApiError(413, f"a medium is larger than {self._most} bytes", param="messages", code="media_too_large")
            if time.monotonic() > end:
                raise _late()
            pieces.append(piece)
        return b"".join(pieces)


def is_public(address: str) -> bool:
    """Whether an address is of the public internet: not private, loopback, link-local, multicast, reserved, or one of these in disguise."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64 carries an IPv4 address in its last four bytes
            return is_public(str(ipaddress.IPv4Address(found.packed[-4:])))
        if found.packed[:12] == bytes(12):  # IPv4-compatible
            return False
    return found.is_global and not found.is_multicast


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _pool(scheme: str, host: str, address: str, port: int, seconds: float) -> urllib3.HTTPConnectionPool:
    """Connections to this very address, whose certificate is the host's."""
    import urllib3

    timeout = urllib3.Timeout(total=seconds)
    if scheme == "http":
        return urllib3.HTTPConnectionPool(address, port, timeout=timeout)
    return urllib3.HTTPSConnectionPool(
        address, port, timeout=timeout, server_hostname=host, assert_hostname=host, cert_reqs="CERT_REQUIRED"
    )


def _prefix(text: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of an allowed origin. Raises InputError."""
    try:
        parts = urlsplit(text)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
        raise InputError(
            f"--allow-media-from {text!r} is not an origin; write it as https://images.example or https://host/folder/"
        )
    return parts.scheme, parts.hostname.rstrip("."), port, parts.path or "/"


def _below(path: str, prefix: str) -> bool:
    """Whether a path lies at or below another. A path that climbs is below nothing."""
    steps = path.replace("%2e", ".").replace("%2E", ".").split("/")
    if ".." in steps:
        return False
    return path == prefix or path.startswith(prefix if prefix.endswith("/") else prefix + "/")


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_media")


def _late() -> ApiError:
    return ApiError(400, "the medium could not be fetched in time", param="messages", code="media_timeout")
