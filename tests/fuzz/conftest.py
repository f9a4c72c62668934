"""Whole things that are then made wrong: a bundle, and checkpoints in published layouts. Do not change them: copy them."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flamingo_export
from flamingo_export.bundle.bundled_tokenizer import placeholder_tokenizer
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.sources import RandomSource
from flamingo_export.sources.choice import RandomWeights
from flamingo_reference.checkpoints.families.native import save_native
from flamingo_reference.config import (
    CrossAttentionConfig,
    LanguageModelConfig,
    ModelConfig,
    NFNetConfig,
    ResamplerConfig,
    TokenIds,
)

SMALL = ModelConfig(
    name="small",
    vision=NFNetConfig(
        image_size=40, widths=(16, 48), depths=(1, 2), stem_widths=(4, 8, 16, 32), feature_width=40, group_width=8
    ),
    resampler=ResamplerConfig(num_layers=1, width=20, num_heads=3, head_size=6, ffw_width=28, num_latents=7),
    cross_attention=CrossAttentionConfig(every=2, num_heads=2, head_size=10, ffw_width=36),
    language_model=LanguageModelConfig(
        num_layers=3, width=24, num_heads=4, head_size=8, ffw_width=44, vocab_size=262, max_positions=64
    ),
    tokens=TokenIds(pad=0, bos=1, eoc=2, image=3),
)
"""Bytes for a vocabulary, so that any text can be encoded."""
Copy = Callable[[Path, Path, str, bytes], Path]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of random weights."""
    path = tmp_path_factory.mktemp("fuzz") / "small.bundle"
    flamingo_export.build(
        RandomWeights(config=SMALL, seed=1), out=path, parity="skip", limits=ShapeLimits(max_length=64, chunk=16, bank_rows=4)
    )
    return path


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the project's own format, with its tokenizer."""
    folder = tmp_path_factory.mktemp("native")
    source = RandomSource(SMALL, seed=1)
    text = placeholder_tokenizer(SMALL)
    assert text is not None
    (folder / "given.json").write_text(text, encoding="utf-8")
    save_native(
        folder / "model", SMALL, ((name, source.read(name)) for name in source.names()), tokenizer=folder / "given.json"
    )
    return folder / "model"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `idefics-tiny` and `openflamingo-tiny`, written in the published layouts (benchmarks/write_checkpoint.py)."""
    scripts = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, scripts)
    try:
        script = importlib.import_module("write_checkpoint")
    finally:
        sys.path.remove(scripts)
    root = tmp_path_factory.mktemp("published")
    for name in ("idefics-tiny", "openflamingo-tiny"):
        (root / name).mkdir()
        script.MODELS[name](root / name)
    # The script fills the archive's members in place; written anew, their checksums are right as well.
    checkpoint = root / "openflamingo-tiny" / "checkpoint.pt"
    torch.save(torch.load(checkpoint, weights_only=True), checkpoint)
    return root


@pytest.fixture(scope="session")
def with_file() -> Copy:
    """Copies a folder to a place, by hard links, with other content in one of its files."""

    def copy(folder: Path, to: Path, name: str, content: bytes) -> Path:
        if to.exists():
            shutil.rmtree(to)
        shutil.copytree(folder, to, copy_function=os.link)
        (to / name).unlink()
        (to / name).write_bytes(content)
        return to

    return copy
