"""The ONNX Runtime backend: contract of sessions and buffers, in-place caches, errors in words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.onnxruntime import HostBuffer, OnnxRuntimeBackend, OnnxRuntimeSession
from flamingo_export.backends.registry import BACKEND_NAMES, availability, get_backend
from flamingo_export.bundle.manifest import GraphRecord, read_manifest
from flamingo_export.errors import BackendError, BundleError, InputError
from flamingo_reference.config import ModelConfig

OPTIONS = SessionOptions(threads=1)


def open_graph(bundle: Path, name: str) -> OnnxRuntimeSession:
    manifest = read_manifest(bundle)
    session = OnnxRuntimeBackend().open(bundle, manifest, manifest.graph(name), OPTIONS)
    assert isinstance(session, OnnxRuntimeSession)
    return session


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path) -> Iterator[OnnxRuntimeSession]:
    session = open_graph(tiny_bundle, "decoder")
    yield session
    session.close()


def bind_all(session: OnnxRuntimeSession, *, batch: int, capacity: int) -> dict[str, HostBuffer]:
    rng = np.random.default_rng(0)
    buffers = {}
    for tensor in session.spec.inputs:
        if "." in tensor.name:
            sizes = {"N": 3, "B": batch, "C": capacity}
            buffer = session.allocate(tensor.name, tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape))
            if tensor.name.startswith("media"):
                buffer.array[:] = rng.normal(size=buffer.shape)
            buffers[tensor.name] = buffer
            session.bind(tensor.name, buffer)
    return buffers


def feeds(*, batch: int, size: int, capacity: int, write_index: int = 0) -> dict[str, np.ndarray]:
    places = np.tile(np.arange(write_index, write_index + size), (batch, 1))
    return {
        "token_ids": np.tile(np.arange(5, 5 + size), (batch, 1)),
        "positions": places,
        "media_rows": np.zeros((batch, 1), np.int64),
        "phi": np.ones((batch, size), np.int64),
        "write_index": np.full(batch, write_index),
        "mask": np.arange(capacity) <= places[:, None, :, None],
        "key_positions": np.tile(np.arange(capacity), (batch, 1)),
        "logit_positions": np.full((batch, 1), size - 1),
    }


def test_the_cache_is_updated_in_place_and_not_returned(decoder: OnnxRuntimeSession, tiny_config: ModelConfig) -> None:
    buffers = bind_all(decoder, batch=2, capacity=8)
    results = decoder.run(feeds(batch=2, size=3, capacity=8))
    assert set(results) == {"logits"}
    assert results["logits"].shape == (2, 1, tiny_config.language_model.vocab_size)
    for layer in range(tiny_config.language_model.num_layers):
        for kind in "kv":
            cache = buffers[f"past_{kind}.{layer}"].read()
            assert (cache[:, :, :3] != 0).all()
            assert (cache[:, :, 3:] == 0).all()


def test_results_belong_to_the_caller(decoder: OnnxRuntimeSession) -> None:
    bind_all(decoder, batch=1, capacity=8)
    first = decoder.run(feeds(batch=1, size=2, capacity=8))["logits"]
    kept = first.copy()
    other = feeds(batch=1, size=2, capacity=8)
    other["token_ids"] += 7
    decoder.run(other)
    assert (first == kept).all()
    first[:] = 0  # and may be written


def test_leading_rows_share_memory_with_the_whole(decoder: OnnxRuntimeSession) -> None:
    buffers = bind_all(decoder, batch=3, capacity=8)
    for name, buffer in buffers.items():
        if name.startswith("past"):
            assert buffer.rows(0, 2) is buffer.rows(0, 2)
            assert buffer.rows(0, 3) is buffer
            decoder.bind(name, buffer.rows(0, 2))
    decoder.run(feeds(batch=2, size=3, capacity=8))
    cache = buffers["past_k.0"].read()
    assert (cache[:2, :, :3] != 0).all()
    assert (cache[2] == 0).all()


def test_rows_from_the_middle_are_written_and_no_others(decoder: OnnxRuntimeSession) -> None:
    buffers = bind_all(decoder, batch=4, capacity=8)
    expected = decoder.run(feeds(batch=4, size=3, capacity=8))["logits"]
    for name, buffer in buffers.items():
        if name.startswith("past"):
            buffer.array[:] = 0
            decoder.bind(name, buffer.rows(1, 2))
            assert buffer.rows(1, 2).rows(1, 1).array.base is not None
    found = decoder.run({name: value[1:3] for name, value in feeds(batch=4, size=3, capacity=8).items()})["logits"]
    np.testing.assert_allclose(found, expected[1:3], atol=1e-5)
    cache = buffers["past_k.0"].read()
    assert (cache[1:3, :, :3] != 0).all()
    assert (cache[[0, 3]] == 0).all()


def test_copying_into_a_larger_buffer_keeps_results(decoder: OnnxRuntimeSession) -> None:
    def second_call(capacity: int) -> np.ndarray:
        return decoder.run(feeds(batch=1, size=2, capacity=capacity, write_index=3))["logits"]

    small = bind_all(decoder, batch=1, capacity=8)
    decoder.run(feeds(batch=1, size=3, capacity=8))
    copies = {
        name: decoder.allocate(name, (1, buffer.shape[1], 12, buffer.shape[3]))
        for name, buffer in small.items()
        if "past" in name
    }
    for name, copy in copies.items():
        copy.copy_from(small[name])
    expected = second_call(8)
    for name, copy in copies.items():
        decoder.bind(name, copy)
    np.testing.assert_allclose(second_call(12), expected, atol=1e-5)


def test_writing_rows_and_reading_copies(decoder: OnnxRuntimeSession) -> None:
    buffer = decoder.allocate("media_k.0", (3, 2, 6, 12))
    buffer.write(1, np.full((2, 6, 12), 4.0, np.float32))
    copy = buffer.read()
    assert (copy[1] == 4).all()
    assert (copy[[0, 2]] == 0).all()
    copy[:] = 9
    assert (buffer.read()[1] == 4).all()


def test_feeds_may_change_shape_from_call_to_call(tiny_bundle: Path, tiny_config: ModelConfig) -> None:
    session = open_graph(tiny_bundle, "vision_encoder")
    side = tiny_config.vision.image_size
    pixels = np.random.default_rng(1).normal(size=(3, 3, side, side)).astype(np.float32)
    whole = session.run({"pixels": pixels})["features"]
    for index in (1, 0, 2):
        np.testing.assert_allclose(session.run({"pixels": pixels[index : index + 1]})["features"][0], whole[index], atol=1e-5)
    np.testing.assert_array_equal(session.run({"pixels": np.asfortranarray(pixels)})["features"], whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": None}, "phi is missing"),
        ({"extra": np.zeros(1)}, "extra is not an input"),
        ({"token_ids": np.zeros((1, 2), np.int32)}, "token_ids is int32, expected int64"),
        ({"mask": np.ones((1, 1, 2, 9), np.bool_)}, "key_positions has shape"),
        ({"positions": np.zeros((2, 2), np.int64)}, "positions has shape"),
        ({"mask": np.ones((1, 1, 2, 8))}, "mask is float64, expected bool"),
    ],
)
def test_feeds_that_break_the_contract(decoder: OnnxRuntimeSession, change: dict[str, Any], message: str) -> None:
    bind_all(decoder, batch=1, capacity=8)
    good = feeds(batch=1, size=2, capacity=8)
    decoder.run(good)  # the good shapes are known, which must not let bad ones pass
    bad = {name: value for name, value in {**good, **change}.items() if value is not None}
    with pytest.raises(InputError, match=f"decoder: .*{message}"):
        decoder.run(bad)
    decoder.run(good)


def test_floats_of_another_width_are_refused(tiny_bundle: Path, tiny_config: ModelConfig) -> None:
    session = open_graph(tiny_bundle, "media_kv")
    shape = (1, tiny_config.resampler.num_latents, tiny_config.resampler.width)
    with pytest.raises(InputError, match="latents is float64, expected float32"):
        session.run({"latents": np.zeros(shape)})


def test_a_buffer_of_another_size_is_checked_again(decoder: OnnxRuntimeSession) -> None:
    bind_all(decoder, batch=1, capacity=8)
    decoder.run(feeds(batch=1, size=2, capacity=8))
    bind_all(decoder, batch=1, capacity=12)
    with pytest.raises(InputError, match="has shape"):
        decoder.run(feeds(batch=1, size=2, capacity=8))


def test_an_output_that_is_bound_is_written_there(tiny_bundle: Path) -> None:
    """And is not among the results; a buffer of another shape than the call's is refused."""
    decoder = open_graph(tiny_bundle, "decoder")
    bind_all(decoder, batch=1, capacity=8)
    given = feeds(batch=1, size=2, capacity=8)
    expected = decoder.run(given)["logits"]
    buffer = HostBuffer(np.zeros((3, *expected.shape[1:]), np.float32))
    decoder.bind("logits", buffer.view(expected.shape))
    assert decoder.run(given) == {}
    np.testing.assert_array_equal(buffer.read()[:1], expected)
    assert not buffer.read()[1:].any()
    decoder.bind("logits", buffer)
    with pytest.raises(InputError, match=r"logits is bound to a buffer of shape \(3, "):
        decoder.run(given)
    with pytest.raises(InputError, match=r"present_k\.0 is not an input, nor an output with memory of its own"):
        decoder.bind("present_k.0", buffer)


def test_binding_what_does_not_belong(decoder: OnnxRuntimeSession) -> None:
    with pytest.raises(InputError, match=r"past_k\.9 is not an input"):
        decoder.bind("past_k.9", HostBuffer(np.zeros((1, 4, 8, 10), np.float32)))
    with pytest.raises(InputError, match="another backend"):
        decoder.bind("past_k.0", object())  # type: ignore[arg-type]


def test_a_run_that_fails_says_so_and_the_session_goes_on(decoder: OnnxRuntimeSession) -> None:
    bind_all(decoder, batch=1, capacity=8)
    bad = feeds(batch=1, size=2, capacity=8)
    bad["token_ids"][:] = 10_000
    with pytest.raises(BackendError, match="decoder failed in onnxruntime: "):
        decoder.run(bad)
    decoder.run(feeds(batch=1, size=2, capacity=8))


def test_a_closed_session(tiny_bundle: Path) -> None:
    session = open_graph(tiny_bundle, "media_kv")
    session.close()
    with pytest.raises(BackendError, match=r"the session is closed. Load the bundle again"):
        session.run({"latents": np.zeros((1, 6, 24), np.float32)})


@pytest.mark.parametrize("damage", ["cut", "noise", "gone", "weights"])
def test_graphs_that_cannot_be_loaded(tiny_bundle: Path, tmp_path: Path, damage: str) -> None:
    bundle = tmp_path / "damaged.bundle"
    shutil.copytree(tiny_bundle, bundle)
    path = bundle / "decoder.onnx"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "noise":
        path.write_bytes(b"not a graph")
    elif damage == "gone":
        path.unlink()
    else:
        for weights in (bundle / "weights").iterdir():
            weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be loaded by onnxruntime .* Check the bundle"):
        open_graph(bundle, "decoder")


def test_devices(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(tiny_bundle)
    backend, graph = OnnxRuntimeBackend(), manifest.graph("media_kv")
    with pytest.raises(
        BackendError, match=r"there is no device 'tpu'\. Choose cpu, cuda, a GPU by its number, cuda:1, or several"
    ):
        backend.open(tiny_bundle, manifest, graph, SessionOptions(device="tpu"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"has no CUDA provider. Uninstall onnxruntime, .*pip install '\.\[gpu\]'"):
        backend.open(tiny_bundle, manifest, graph, SessionOptions(device="cuda"))


def test_parts_of_the_decoder_open_with_their_own_contract(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    record = GraphRecord(name="decoder.0", file="decoder.onnx", layers=(0, 2))
    session = OnnxRuntimeBackend().open(tiny_bundle, manifest, record, OPTIONS)
    assert session.spec.name == "decoder.0"
    assert session.spec.outputs[0].name == "hidden_out"


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_backend("auto").name == "onnxruntime"
    assert get_backend("onnxruntime").name == "onnxruntime"
    with pytest.raises(BackendError, match=r"there is no backend 'tensorflow'. Choose one of: auto, onnxruntime"):
        get_backend("tensorflow")
    assert set(availability()) == set(BACKEND_NAMES)
    assert "onnxruntime 1." in availability()["onnxruntime"].detail
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not availability()["onnxruntime"].usable
    for name in ("onnxruntime", "auto"):
        with pytest.raises(BackendError, match=r"onnxruntime cannot be imported.*pip install '\.\[cpu\]'"):
            get_backend(name)
