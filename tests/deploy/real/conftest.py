"""Hosts that run for real: each in an environment of its own (`make test-deploy`), and skipped where it is not installed."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flamingo_export
from flamingo_export.sources.choice import source_for_size


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's trained weights, or those that FLAMINGO_NANO names: a build costs a while."""
    if "FLAMINGO_NANO" in os.environ:
        return Path(os.environ["FLAMINGO_NANO"]).resolve()
    path = tmp_path_factory.mktemp("deploy") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    return path


@pytest.fixture(scope="session")
def picture() -> Callable[[int], bytes]:
    """PNG files of squares, as nano knows them; different for each number."""
    from PIL import Image, ImageDraw

    def made(number: int) -> bytes:
        image = Image.new("RGB", (64, 64), "white")
        place = 4 + number % 24
        ImageDraw.Draw(image).rectangle((place, place, place + 28, place + 28), fill=("red", "green", "blue")[number % 3])
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    return made


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def chat_body(picture: bytes, **settings: Any) -> dict[str, Any]:
    """A caption of a picture, asked in OpenAI's form."""
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"model": "nano", "messages": [{"role": "user", "content": content}], **settings}


def post(port: int, body: dict[str, Any], *, path: str = "/v1/chat/completions", timeout: float = 120) -> tuple[int, bytes]:
    """Status and body of an answer."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
