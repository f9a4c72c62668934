"""Many requests from a file, through the same engine that a server has (file_lines says what a line is).

A result is a line too, written as soon as it is there. What is in the result file already is not done again, if it came from the same requests,
bundle and settings; `OUT.run.json` beside it says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from flamingo_export.errors import InputError
from flamingo_export.files import disk_errors, exclusive, write_atomically
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions, Settings
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.serve.file_answers import AHEAD, answer_line, failed
from flamingo_export.serve.file_lines import AskedLine, read_lines


@dataclass
class Tally:
    """How a run went."""

    done: int = 0
    failed: int = 0
    """Lines without an answer, those of earlier runs too."""
    before: int = 0
    """Results that were there already."""


def run_file(model: Model, requests: Path, out: Path, settings: Settings, *, progress: Progress = SILENT) -> Tally:
    """Answers every line of `requests` into `out`, in order of completion.

    settings: of lines that do not say otherwise.
    Raises InputError if the file cannot be read or an id stands in it twice, or if `out` holds results of other requests, another bundle or
    other settings, or another process writes it. A line that fails is a result with its error.
    """
    asked = list(read_lines(requests))
    GenerateOptions(**settings).check_values()
    identity = _identity(model, requests, settings)
    if out.is_dir():
        raise InputError(f"{out} is a folder, expected a file for the results")
    with exclusive(
        out.with_name(out.name + ".lock"),
        busy=lambda holder: InputError(
            f"another command (process {holder}) is writing {out}. Wait for it, or name another --out."
        ),
        unwritable=lambda error: InputError(f"{out} cannot be written: {error.strerror}"),
    ):
        with disk_errors(out, InputError):
            done = _resumed(out, identity)
        left = [each for each in asked if each.key not in done]
        tally = Tally(before=len(asked) - len(left), failed=sum(done.values()))
        progress.stage("requests", len(left))
        with disk_errors(out, InputError), out.open("ab") as file, ThreadPoolExecutor(model.engine.rows + AHEAD) as pool:
            _run(model, requests.parent, left, settings, file, pool, tally, progress)
    return tally


def _run(
    model: Model,
    folder: Path,
    left: Sequence[AskedLine],
    settings: Settings,
    file: IO[bytes],
    pool: ThreadPoolExecutor,
    tally: Tally,
    progress: Progress,
) -> None:
    waiting = iter(left)
    running: set[Future[dict[str, Any]]] = set()
    tickets: set[Ticket[Any]] = set()
    most = model.engine.rows + AHEAD
    try:
        while True:
            for each in waiting:
                running.add(pool.submit(answer_line, model, folder, each, settings, tickets))
                if len(running) >= most:
                    break
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                result = future.result()
                file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
                tally.done += 1
                tally.failed += failed(result)
                progress.advance(1)
            file.flush()
    except BaseException:
        for future in running:
            future.cancel()
        for ticket in list(tickets):
            ticket.cancel()
        raise


def _identity(model: Model, requests: Path, settings: Settings) -> dict[str, Any]:
    """What must be the same for results to go together. A setting at its default is left out, as where it was not given."""
    usual = GenerateOptions(), GenerateOptions(stop=[], choice=[])
    given = {
        name: value
        for name, value in sorted(settings.items())
        if value is not None and (name == "length_penalty" or all(value != getattr(each, name) for each in usual))
    }
    return {
        "requests": hashlib.sha256(requests.read_bytes()).hexdigest(),
        "bundle": hashlib.sha256(msgspec.json.encode(model.manifest.files)).hexdigest(),
        "settings": json.loads(json.dumps(given)),  # ids of tokens become texts in JSON
    }


def _resumed(out: Path, identity: dict[str, Any]) -> dict[str, bool]:
    """Keys of the results that `out` holds, and whether each failed. A line that was cut is taken off.

    Raises InputError for results of another run.
    """
    beside = out.with_name(out.name + ".run.json")
    if not out.exists():
        write_atomically(beside, json.dumps(identity, indent=2).encode() + b"\n")
        out.touch()
        return {}
    try:
        known = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        known = None
    if known != identity:
        differs = [name for name in identity if not isinstance(known, dict) or known.get(name) != identity[name]]
        raise InputError(
            f"{out} holds results of another run ({', '.join(differs)} differ). Name another file with --out, or remove this one."
        )
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with out.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    keys = {}
    for raw in data[:whole].splitlines():
        record = json.loads(raw)
        name = record.get("custom_id", record.get("id"))
        keys[name if isinstance(name, str) else json.dumps(name)] = failed(record)
    return keys
