"""Requests byte by byte, for headers that no client library would send."""

from __future__ import annotations

import socket
from collections.abc import Sequence


def http(port: int, path: str, header: bytes) -> bytes:
    """The answer to a GET with one line of header as it is given; empty where the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), 10) as one:
        one.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + header + b"\r\nConnection: close\r\n\r\n")
        return _rest(one)


def grpc(port: int, method: str, fields: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The message that answers an empty one; None where the call is refused. fields: headers of HTTP/2 beside those that gRPC needs."""
    needed = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    headers = b"".join(b"\0" + _text(name) + _text(value) for name, value in [*needed, *fields])
    with socket.create_connection(("127.0.0.1", port), 10) as one:
        one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        one.sendall(_frame(1, 4, 1, headers) + _frame(0, 1, 1, b"\0" * 5))
        answer = _rest(one, seconds=2)
    while len(answer) >= 9:
        length, kind = int.from_bytes(answer[:3], "big"), answer[3]
        if kind == 0:  # data
            return answer[9 : 9 + length]
        answer = answer[9 + length :]
    return None


def _frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


def _text(value: bytes) -> bytes:
    """A string of HPACK, not compressed (RFC 7541, 5.2): its length with seven bits of a first byte, and the bytes."""
    length = len(value)
    if length < 127:
        return bytes([length]) + value
    assert length < 127 + 128
    return bytes([127, length - 127]) + value


def _rest(one: socket.socket, *, seconds: float = 10) -> bytes:
    one.settimeout(seconds)
    found = b""
    try:
        while part := one.recv(65536):
            found += part
    except (TimeoutError, ConnectionResetError):
        pass
    return found
