"""Small models as the build takes them, and a child process to interrupt."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from recorder import Recorder

from flamingo_export.bundle import verify
from flamingo_export.bundle.bundled_tokenizer import placeholder_tokenizer
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo


@pytest.fixture(scope="session")
def spoken_config(tiny_config: ModelConfig) -> ModelConfig:
    """The tiny model with a vocabulary that has room for the bytes."""
    lm = msgspec.structs.replace(tiny_config.language_model, vocab_size=300)
    return msgspec.structs.replace(tiny_config, language_model=lm, name="spoken")


@pytest.fixture
def checkpoint(tiny_model: Flamingo, tmp_path: Path) -> Path:
    """A checkpoint folder of the tiny model, without tokenizer."""
    tiny_model.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def tokenizer_file(spoken_config: ModelConfig, tmp_path: Path) -> Path:
    path = tmp_path / "given-tokenizer.json"
    path.write_text(placeholder_tokenizer(spoken_config) or "", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def in_child(work: Callable[[], Any]) -> Iterator[int]:
    """Runs `work` in a forked child, whose pid is given: exit code 0 if it returned, 3 if interrupted, 4 with any other exception."""
    child = os.fork()
    if child == 0:
        # What the parent has left for its garbage collector stays: a session of ONNX Runtime would wait for threads that no child has.
        gc.freeze()
        code = 0
        try:
            work()
        except KeyboardInterrupt:
            code = 3
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            code = 4
        os._exit(code)
    try:
        yield child
    finally:
        try:
            os.kill(child, 9)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def wait(child: int) -> int:
    """Exit code of a child, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
