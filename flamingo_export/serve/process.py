"""The server as a process: sockets, signals, logs, and an end that loses no accepted request."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn

from flamingo_export.errors import InputError
from flamingo_export.serve.app import Server, create_app

_STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
_SWITCH = 0.0005
"""Seconds after which a thread that computes lets another one run. The event loop waits up to so long, each time that a socket is ready, for
the engine's thread and those that decode images. A refusal waits about eight times: 40 ms with Python's own 5 ms."""


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON: time, level, logger, message, what was given as `extra`, and a traceback where there is one."""
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def set_up_logs() -> None:
    """Everything that this package and uvicorn say goes to stderr, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("flamingo_export", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)


class _Draining(uvicorn.Server):
    """Stops on SIGTERM and SIGINT once what was accepted has been answered; a second signal does not wait."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[Any] | None = None) -> None:
        """As uvicorn's."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        if self._server.draining:
            self.should_exit = self.force_exit = True
            return
        self._server.draining = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        end = time.monotonic() + self._server.settings.drain_seconds
        while self._server.active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address of a host, bound but not listening: nobody else gets the port while models are opened.

    Raises InputError for a host that is not known or not this machine's, and a port that is taken or not allowed.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            sockets.append(each := socket.socket(family, socket.SOCK_STREAM))
            if sys.platform != "win32":
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind(address)
    except (OSError, UnicodeError) as error:
        for each in sockets:
            each.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{host}, port {port}, cannot be listened on: {reason}. Name another with --host or --port."
        ) from error
    return sockets


def serve(server: Server, sockets: list[socket.socket] | None = None) -> int:
    """Listens until it is asked to stop; returns the exit code: 0 if every accepted request was answered.

    sockets: bound ones; by default new ones for the settings' host and port.
    """
    sockets = sockets or bound(server.settings.host, server.settings.port)
    settings = server.settings
    config = uvicorn.Config(
        create_app(server),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
        loop="asyncio",
        http="h11",
        ws="none",
    )
    running = _Draining(config, server)

    async def run() -> None:
        def reload() -> None:
            tasks.add(task := asyncio.ensure_future(server.models.reload()))
            task.add_done_callback(tasks.discard)

        tasks: set[asyncio.Task[None]] = set()
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        await running.serve(sockets)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        asyncio.run(run())
    finally:
        sys.setswitchinterval(usual)
    if not running.started:
        return 1
    return 1 if server.active else 0
