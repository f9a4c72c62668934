"""Media as vectors, whichever way batches are run: copies side by side or one on all cores; order, videos among images, what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flamingo_export
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.onnxruntime import OnnxRuntimeBackend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.errors import ImageError
from flamingo_export.evaluation.index import encoder as module
from flamingo_export.evaluation.index.encoder import FRAMES_AT_ONCE, SMALL_AT_ONCE, Encoder
from flamingo_export.runtime.media import load_medium
from flamingo_export.runtime.videos import Video
from flamingo_export.sources.choice import source_for_size


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "nano.bundle"
    return flamingo_export.build(source_for_size("nano"), out=out, parity="skip").path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(45)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 64, 3), dtype=np.uint8)).save(path)
    return paths


def opened(bundle: Path, threads: int) -> Encoder:
    return Encoder(bundle, read_manifest(bundle), OnnxRuntimeBackend(), SessionOptions(threads=threads))


def one_by_one(bundle: Path, media: list[Path | Video]) -> np.ndarray:
    """Each medium by itself through the graphs, frames averaged."""
    manifest, backend = read_manifest(bundle), OnnxRuntimeBackend()
    vision, tower = (
        backend.open(bundle, manifest, manifest.graph(name), SessionOptions(threads=1))
        for name in ("vision_encoder", "image_tower")
    )
    found = []
    for medium in media:
        pixels = load_medium(medium, manifest.config, manifest.inputs.fit).pixels
        found.append(tower.run({"pooled": vision.run({"pixels": pixels})["pooled"]})["image_embedding"].mean(0))
    return np.stack(found)


@pytest.mark.parametrize("threads", [1, 3])
def test_vectors_come_in_order(bundle: Path, pictures: list[Path], threads: int) -> None:
    encoder = opened(bundle, threads)
    assert encoder.copies == threads
    assert encoder.at_once == (FRAMES_AT_ONCE if threads == 1 else SMALL_AT_ONCE)
    clip = Video(source=[np.asarray(Image.open(path)) for path in pictures[:20]], num_frames=20)
    media: list[Path | Video] = [*pictures[:19], clip, *pictures[19:]]
    found = encoder.encode(media)
    encoder.close()
    np.testing.assert_allclose(found, one_by_one(bundle, media), atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_and_what_cannot_be_read(bundle: Path, pictures: list[Path], threads: int) -> None:
    encoder = opened(bundle, threads)
    assert encoder.encode([]).shape == (0, 0)
    stream = encoder.stream([*pictures[:40], Path("gone.png"), *pictures[40:]])
    sure = 32  # whole batches before it, of either size
    assert len([next(stream) for _ in range(sure)]) == sure
    with pytest.raises(ImageError, match=r"gone.png does not exist"):
        list(stream)
    assert len(encoder.encode(pictures)) == len(pictures)  # it goes on after that
    encoder.close()


def test_large_encoders_have_all_cores_for_one_batch(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPIES_BYTES", 1 << 10)
    encoder = opened(bundle, 2)
    assert (encoder.copies, encoder.at_once) == (1, FRAMES_AT_ONCE)
    encoder.close()
