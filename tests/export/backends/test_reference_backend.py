"""The PyTorch reference as a backend: sessions that keep the contract, and parity with itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.reference import ReferenceBackend
from flamingo_export.bundle.manifest import GraphRecord, Manifest, read_manifest
from flamingo_export.errors import BackendError, InputError
from flamingo_export.sources import LiveSource
from flamingo_reference.model import Flamingo

OPTIONS = SessionOptions(threads=1)


@pytest.fixture
def backend(tiny_model: Flamingo) -> ReferenceBackend:
    return ReferenceBackend(LiveSource(tiny_model))


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


def decoder_feeds(manifest: Manifest, *, length: int, capacity: int) -> dict[str, np.ndarray]:
    config = manifest.config
    block, lm = config.cross_attention, config.language_model
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        "token_ids": random.integers(4, lm.vocab_size, (1, length)),
        "positions": np.arange(length)[None],
        "media_rows": np.zeros((1, 1), np.int64),
        "phi": np.ones((1, length), np.int64),
        "write_index": np.zeros(1, np.int64),
        "mask": np.tril(np.ones((length, capacity), np.bool_))[None, None],
        "key_positions": np.arange(capacity)[None],
        "logit_positions": np.arange(length)[None],
    }
    for i in range(len(config.gated_layers)):
        for kind in "kv":
            shape = (1, block.num_heads, config.resampler.num_latents, block.head_size)
            feeds[f"media_{kind}.{i}"] = random.standard_normal(shape).astype(np.float32)
    return feeds


def test_decoder_gives_the_models_logits_and_writes_its_cache_in_place(
    backend: ReferenceBackend, tiny_bundle: Path, manifest: Manifest, tiny_model: Flamingo
) -> None:
    import torch

    length, capacity = 7, 10
    session = backend.open(tiny_bundle, manifest, manifest.graph("decoder"), OPTIONS)
    feeds = decoder_feeds(manifest, length=length, capacity=capacity)
    lm = manifest.config.language_model
    caches = {}
    for name in session.spec.aliases.values():
        caches[name] = session.allocate(name, (1, lm.num_heads, capacity, lm.head_size))
        session.bind(name, caches[name])
    results = session.run(feeds)
    assert list(results) == ["logits"]
    bank = [(torch.from_numpy(feeds[f"media_k.{i}"]), torch.from_numpy(feeds[f"media_v.{i}"])) for i in range(2)]
    with torch.no_grad():
        tensors = (torch.from_numpy(feeds[name]) for name in ("media_rows", "phi"))
        expected = tiny_model(torch.from_numpy(feeds["token_ids"]), bank, *tensors).numpy()
    np.testing.assert_allclose(results["logits"], expected, rtol=0, atol=2e-5)
    written = caches["past_k.0"].read()
    assert np.abs(written[:, :, :length]).min(axis=(0, 1, 3)).min() >= 0
    assert np.abs(written[:, :, :length]).max() > 0
    assert not written[:, :, length:].any()


def test_a_part_of_the_decoder_takes_hidden_states(backend: ReferenceBackend, tiny_bundle: Path, manifest: Manifest) -> None:
    session = backend.open(tiny_bundle, manifest, GraphRecord(name="decoder.1", file="", layers=(1, 2)), OPTIONS)
    assert next(tensor.name for tensor in session.spec.inputs) == "hidden"
    assert [tensor.name for tensor in session.spec.outputs] == ["hidden_out", "present_k.1", "present_v.1"]


def test_fed_caches_are_not_written_to(backend: ReferenceBackend, tiny_bundle: Path, manifest: Manifest) -> None:
    session = backend.open(tiny_bundle, manifest, manifest.graph("decoder"), OPTIONS)
    feeds = decoder_feeds(manifest, length=3, capacity=4)
    lm = manifest.config.language_model
    for name in session.spec.aliases.values():
        feeds[name] = np.zeros((1, lm.num_heads, 4, lm.head_size), np.float32)
    results = session.run(feeds)
    assert results["present_k.0"].any()
    assert not feeds["past_k.0"].any()


def test_buffers_share_rows_and_copy_into_the_corner(backend: ReferenceBackend, tiny_bundle: Path, manifest: Manifest) -> None:
    session = backend.open(tiny_bundle, manifest, manifest.graph("decoder"), OPTIONS)
    large = session.allocate("past_k.0", (2, 4, 6, 10))
    large.rows(0, 1).write(0, np.ones((4, 6, 10)))
    assert large.read()[0].all()
    assert not large.read()[1].any()
    wider = session.allocate("past_k.0", (3, 4, 8, 10))
    wider.copy_from(large)
    assert wider.read()[0, :, :6].all()
    assert not wider.read()[:, :, 6:].any()


def test_wrong_feeds_and_closed_sessions_are_errors(backend: ReferenceBackend, tiny_bundle: Path, manifest: Manifest) -> None:
    session = backend.open(tiny_bundle, manifest, manifest.graph("media_kv"), OPTIONS)
    with pytest.raises(InputError, match="latents is missing"):
        session.run({})
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run({"latents": np.zeros((1, 6, 24), np.float32)})


def test_without_known_weights_or_on_a_gpu_it_says_so(tiny_bundle: Path, manifest: Manifest, backend: ReferenceBackend) -> None:
    with pytest.raises(BackendError, match="--checkpoint DIR"):
        ReferenceBackend().open(tiny_bundle, manifest, manifest.graph("decoder"), OPTIONS)
    with pytest.raises(BackendError, match="not on cuda"):
        backend.open(tiny_bundle, manifest, manifest.graph("decoder"), SessionOptions(device="cuda"))
