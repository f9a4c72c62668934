"""A command line in this process, and a bundle of random weights in nano's sizes to use it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flamingo_export
from flamingo_export.sources.choice import source_for_size


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a line and returns exit code, stdout and stderr of it."""
    from flamingo_export.cli import main

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in nano's sizes, a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("cli") / "random.bundle"
    flamingo_export.build(source_for_size("nano", seed=3), out=path, parity="skip")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png, b.png, c.png and clip.gif of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    frames = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(6)]
    for name, image in zip("abc", frames, strict=False):
        image.save(folder / f"{name}.png")
    frames[3].save(folder / "clip.gif", save_all=True, append_images=frames[4:], duration=100)
    return folder
