"""A server of `flamingo-export serve` as what is evaluated: the same prompts through its API."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np

from flamingo_export.errors import CapacityError, EvaluationError
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.runtime.images import load_image
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video
from flamingo_reference.input_format import InputFormat

_BUSY = (429, 503)
_TRIES = 12
_TIMEOUT = 600.0
T = TypeVar("T")
R = TypeVar("R")


class ServerModel:
    """A model behind a server's `/v1/completions` and `/v1/score`."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None, parallel: int = 8) -> None:
        """Asks the server which models it has.

        url: with its path, `http://127.0.0.1:8000/v1`. model: None takes the only one. parallel: requests on their way at once.
        Raises EvaluationError if the server does not answer, is another one, or has several models and none is named.
        """
        if urlsplit(url).scheme not in ("http", "https"):
            raise EvaluationError(f"{url!r} is not the address of a server; expected one such as http://127.0.0.1:8000/v1")
        self._url, self._key, self._parallel = url.rstrip("/"), api_key, parallel
        cards = {card.get("id"): card for card in self._call("/models").get("data", [])}
        if model is None and len(cards) == 1:
            model = next(iter(cards))
        if model not in cards:
            raise EvaluationError(f"the server {url} has the models {', '.join(map(str, cards))}; name one: --model NAME")
        self._model, card = model, cards[model]
        known = card.get("flamingo")
        if not isinstance(known, dict):
            raise EvaluationError(
                f"the server {url} does not say what its bundle is; expected one of `flamingo-export serve` of this version"
            )
        self._most_media = int(card["max_media"])
        self._inputs = msgspec.convert(known["inputs"], InputFormat)
        self._identity = {"name": str(model), **{key: str(known[key]) for key in ("digest", "precision", "backend", "parity")}}

    @property
    def identity(self) -> Mapping[str, str]:
        """The bundle's, as the server describes it."""
        return self._identity

    @property
    def inputs(self) -> InputFormat:
        """The bundle's."""
        return self._inputs

    def check(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> None:
        """Raises CapacityError for more media than the bank holds. The longest prompt is sent once: what the server refuses it refuses now."""
        if not requests:
            return
        media = max(len(request.media) for request in requests)
        if media > self._most_media:
            raise CapacityError(
                f"a prompt shows {media} images, the server's media bank holds {self._most_media}. Give fewer shots."
            )
        self._generated(max(requests, key=lambda request: len(str(request.prompt))), beams, max_new_tokens)

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[Answer]:
        """The best text for each request; the API does not return token ids."""
        return self._together(lambda request: self._generated(request, beams, max_new_tokens), requests)

    def score(self, requests: Sequence[Request], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods of each request's candidates."""

        def scored(pair: tuple[Request, Sequence[str]]) -> list[float]:
            request, choices = pair
            found = self._call("/score", {**self._asked(request), "candidates": list(choices), "end": True})
            return [float(each["logprob"]) for each in found["scores"]]

        return self._together(scored, list(zip(requests, candidates, strict=True)))

    def _generated(self, request: Request, beams: int, max_new_tokens: int) -> Answer:
        body = {**self._asked(request), "beams": beams, "max_tokens": max_new_tokens, "logprobs": 1}
        choice = self._call("/completions", body)["choices"][0]
        return Answer(
            text=str(choice["text"]).strip(),
            token_ids=(),
            token_logprobs=tuple(float(value) for value in (choice.get("logprobs") or {}).get("token_logprobs", ())),
            finished=choice.get("finish_reason") == "stop",
        )

    def _asked(self, request: Request) -> dict[str, Any]:
        return {"model": self._model, "prompt": request.prompt, "images": [data_url(medium) for medium in request.media]}

    def _together(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(call, items))

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON; a busy server is asked again after a while. Raises EvaluationError with what the server said."""
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        for tried in range(_TRIES):
            asked = urllib.request.Request(f"{self._url}{path}", data=data, headers=headers)
            try:
                with urllib.request.urlopen(asked, timeout=_TIMEOUT) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code in _BUSY and tried + 1 < _TRIES:
                    time.sleep(min(30.0, _seconds(error.headers.get("retry-after")) or 0.2 * 2**tried))
                    continue
                raise EvaluationError(f"{self._url}{path} answered {error.code}: {reason}") from None
            except (OSError, ValueError) as error:
                raise EvaluationError(
                    f"{self._url}{path} does not answer ({error}). Is it running? flamingo-export serve BUNDLE"
                ) from None
        raise AssertionError("the last try returns or raises")


def data_url(medium: MediumSource) -> str:
    """A medium's bytes as a URL. Raises EvaluationError for videos, which `/v1/completions` does not take; ImageError."""
    from PIL import Image

    if isinstance(medium, Video):
        raise EvaluationError("videos are not sent to a server's /v1/completions; evaluate the bundle itself")
    if isinstance(medium, str | Path) and Path(medium).is_file():
        kind = mimetypes.guess_type(str(medium))[0] or "image/png"
        data = Path(medium).read_bytes()
    else:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(load_image(medium))).save(buffer, format="PNG")
        kind, data = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200] or error.reason


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
