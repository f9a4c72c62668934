"""Requests of Triton's Python backend, answered by the engine: as many at once as it has rows, the others wait in Triton's queue."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_export.deploy.triton.requests import Asked, read, result_of
from flamingo_export.errors import BundleError, DeadlineExceeded, FlamingoExportError, InputError
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.steering import HoldBack
from flamingo_export.runtime.ticket import Ticket, now
from flamingo_export.runtime.tokenizer import TextStream

BUNDLE = "FLAMINGO_BUNDLE"
"""Variable of the environment that names the bundle."""
_SPARE = 2
"""Requests that are decoded beside those in the engine's rows."""
_LOOK = 0.05
"""Seconds between looks at whether a client has gone."""


class Requests:
    """What `model.py` is made of. triton: Triton's module `triton_python_backend_utils`, which exists in its process only."""

    def __init__(self, triton: Any) -> None:
        self._triton = triton
        self._model: Model
        self._room: threading.Semaphore
        self._workers: ThreadPoolExecutor

    def open(self, parameters: dict[str, Any]) -> None:
        """Opens the bundle that the environment names, and answers one request: Triton says that it is ready after this.

        parameters: of `config.pbtxt`: rows, threads, backend, device. Raises BundleError where no bundle is named or it gives no answer.
        """
        import flamingo_export

        def said(name: str, default: str) -> str:
            return str(parameters.get(name, {}).get("string_value", default)) or default

        if BUNDLE not in os.environ:
            raise BundleError(f"no bundle is named. Start it with run BUNDLE, or set {BUNDLE} to the bundle's folder.")
        rows = int(said("rows", "0")) or None
        self._model = flamingo_export.load(
            Path(os.environ[BUNDLE]),
            backend=said("backend", "auto"),
            device=said("device", "cpu"),
            threads=int(said("threads", "0")),
            rows=rows,
        )
        side = self._model.config.vision.image_size
        grey = np.full((side, side, 3), 127, np.uint8)
        self._model.caption(grey, max_new_tokens=2)
        most = self._model.engine.rows + _SPARE
        self._room = threading.Semaphore(most)
        self._workers = ThreadPoolExecutor(most, thread_name_prefix="flamingo-export request")

    def take(self, requests: Sequence[Any]) -> None:
        """Hands requests to the engine, and returns when it has taken them. Until there is room, further ones wait in Triton's queue."""
        for request in requests:
            sender = request.get_response_sender()
            self._room.acquire()
            try:
                self._workers.submit(self._answer, request, sender)
            except BaseException:
                self._room.release()
                raise

    def close(self) -> None:
        """Waits for what runs, and closes the bundle."""
        self._workers.shutdown(wait=True)
        self._model.close()

    def _answer(self, request: Any, sender: Any) -> None:
        triton = self._triton
        try:
            prompt, images, options = self._inputs(request)
            asked = read(self._model, prompt, images, options)
            self._run(asked, request, sender)
        except _Gone:
            self._fail(sender, "the client has gone", triton.TritonError.CANCELLED)
        except DeadlineExceeded as error:
            self._fail(sender, str(error), triton.TritonError.UNAVAILABLE)
        except FlamingoExportError as error:
            wrong = isinstance(error, InputError)
            self._fail(sender, str(error), triton.TritonError.INVALID_ARG if wrong else triton.TritonError.INTERNAL)
        except Exception as error:
            triton.Logger.log_error(f"request failed: {error!r}")
            self._fail(sender, "the model failed on this request; Triton's log has the reason", triton.TritonError.INTERNAL)
        finally:
            self._room.release()

    def _inputs(self, request: Any) -> tuple[str, list[bytes], str]:
        def strings(name: str) -> list[bytes]:
            tensor = self._triton.get_input_tensor_by_name(request, name)
            return [] if tensor is None else [bytes(value) for value in tensor.as_numpy().reshape(-1)]

        def text(name: str) -> str:
            found = strings(name)
            if len(found) > 1:
                raise InputError(f"{len(found)} values of {name} were given, expected one")
            try:
                return found[0].decode() if found else ""
            except UnicodeDecodeError as error:
                raise InputError(f"{name} is not UTF-8: {error}") from error

        return text("prompt"), [image for image in strings("images") if image], text("options")

    def _run(self, asked: Asked, request: Any, sender: Any) -> None:
        model = self._model
        deadline = None if asked.timeout is None else now() + asked.timeout
        ticket = model.engine.submit(model.prepare(asked.request), asked.options, deadline=deadline, events=asked.stream)
        try:
            pieces = self._pieces(ticket, request, asked, sender)
            found = model.generation(ticket.result(), asked.options, ticket.timings)
        except BaseException:
            ticket.cancel()
            raise
        text = found.text
        if asked.stream:
            text = text[len(pieces) :] if text.startswith(pieces) else text
        self._send(sender, text, final=True, result=result_of(found))

    def _pieces(self, ticket: Ticket[Outcome], request: Any, asked: Asked, sender: Any) -> str:
        """Sends text as it becomes certain, and looks after the client meanwhile; returns what was sent. Raises _Gone."""
        sent = ""
        if asked.stream and self._model.tokenizer is not None:
            stream, hold = TextStream(self._model.tokenizer), HoldBack(asked.options.stops, strip=True)
            # Which of several samples is the best is known at the end.
            one_text = asked.options.width == 1 or not asked.options.samples
            for tokens in ticket:
                if request.is_cancelled():
                    raise _Gone
                if one_text and (text := hold.push(stream.push(tokens.token_ids))):
                    sent += text
                    self._send(sender, text)
            return sent
        while not ticket.done:
            if request.is_cancelled():
                raise _Gone
            _wait(ticket)
        return sent

    def _send(self, sender: Any, text: str, *, final: bool = False, result: str = "") -> None:
        triton = self._triton
        outputs = [
            triton.Tensor("text", np.array([[text.encode()]], dtype=np.object_)),
            triton.Tensor("final", np.array([[final]])),
            triton.Tensor("result", np.array([[result.encode()]], dtype=np.object_)),
        ]
        last = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        sender.send(triton.InferenceResponse(outputs), flags=last)

    def _fail(self, sender: Any, text: str, code: Any) -> None:
        triton = self._triton
        response = triton.InferenceResponse(output_tensors=[], error=triton.TritonError(text, code))
        sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class _Gone(Exception):
    """The client has cancelled the request."""


def _wait(ticket: Ticket[Any]) -> None:
    """Until the ticket is done, a short while at most."""
    end = time.monotonic() + _LOOK
    while not ticket.done and time.monotonic() < end:
        time.sleep(0.002)
