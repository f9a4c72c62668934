"""A decoder in parts computes what the whole one computes: the same tokens, and on ONNX Runtime the same log-probabilities to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variations import VARIATIONS, drawn_model

import flamingo_export
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.reference import ReferenceBackend
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.errors import BackendError, InputError
from flamingo_export.runtime.decoder_parts import DecoderParts
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.runtime.texts import Generation
from flamingo_export.sources import LiveSource
from flamingo_export.sources.choice import source_for_size
from flamingo_export.specs import subgraph_specs
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

from .conftest import Oracle, frames_of, random_request

PARTS = (2, 3, 6)
Open = Callable[[int], Model]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The trained nano with its decoder in so many parts. Prompts of more than 24 tokens are run in chunks."""
    folder, limits = tmp_path_factory.mktemp("parts"), ShapeLimits(max_length=256, chunk=24, bank_rows=8)
    return {
        parts: flamingo_export.build(
            source_for_size("nano"), out=folder / f"{parts}.bundle", parts=parts, limits=limits, parity="skip"
        ).path
        for parts in (1, *PARTS)
    }


@pytest.fixture
def nano(bundles: dict[int, Path]) -> Iterator[Open]:
    """Opens them. A model has its own caches and bank: what is reused of earlier prompts changes the last bits."""
    with ExitStack() as stack:
        yield lambda parts: stack.enter_context(flamingo_export.load(bundles[parts], backend="onnxruntime", threads=1))


def told(generations: Sequence[Generation]) -> list[object]:
    """All that was generated, numbers to the last bit."""
    return [
        [(text.text, text.token_ids, text.token_logprobs, text.score, text.finished) for text in (each, *each.alternatives)]
        for each in generations
    ]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 1},
        {"beams": 3, "num_return": 3},
        {"beams": 9},
        {"temperature": 1.0, "seed": 5, "num_return": 2},
        {"temperature": 0.7, "top_k": 4, "seed": 6},
    ],
)
def test_the_same_texts(nano: Open, parts: int, settings: dict[str, Any]) -> None:
    whole, cut = nano(1), nano(parts)
    assert isinstance(cut.engines.decoder, DecoderParts)
    requests = [random_request(whole.config, seed, 6 + 17 * seed, seed) for seed in range(5)]
    for asked in (requests, requests[::-1], requests[3:4]):  # several at a time, and one whose cache is already there
        found, expected = (model.generate(asked, max_new_tokens=7, batch_size=3, **settings) for model in (cut, whole))
        assert told(found) == told(expected)
        for one, other in zip(found, expected, strict=True):
            assert (one.timings.reused_tokens, one.timings.media_reused) == (
                other.timings.reused_tokens,
                other.timings.media_reused,
            )


@pytest.mark.parametrize("parts", PARTS)
def test_the_same_scores_and_streams(nano: Open, parts: int) -> None:
    whole, cut = nano(1), nano(parts)
    asked = random_request(whole.config, 20, 60, 3)
    candidates = [[5], [6, 7, 8], list(range(20, 60)), [9, 2]]
    assert cut.score(asked, candidates) == whole.score(asked, candidates)
    pieces = [list(model.stream(asked, beams=3, max_new_tokens=6)) for model in (cut, whole)]
    assert pieces[0] == pieces[1]
    assert cut.engines.decoder.largest == {}


@pytest.fixture(params=[2, 3])
def tiny(
    bundle_writer: Callable[..., Path], tiny_model: Flamingo, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Model]:
    """The tiny model in parts, of which with three the middle one has no gated block and so no media."""
    bundle = bundle_writer(LiveSource(tiny_model), tmp_path / "tiny.bundle", parts=request.param)
    with flamingo_export.load(bundle, backend="onnxruntime", threads=1) as model:
        yield model


def test_against_the_reference_in_float64(tiny: Model, oracle: Oracle) -> None:
    for seed, length, media in ((0, 9, 1), (1, 40, 5), (2, 3, 0)):
        asked = random_request(tiny.config, seed, length, media)
        assert isinstance(asked.prompt, list)
        found = tiny.generate(asked, beams=1, max_new_tokens=6)
        assert list(found.token_ids) == oracle.greedy(asked.prompt, frames_of(asked), 6)
        exact = oracle.logprobs([*asked.prompt, *found.token_ids], frames_of(asked))
        expected = [exact[length - 1 + k, token] for k, token in enumerate(found.token_ids)]
        np.testing.assert_allclose(found.token_logprobs, expected, atol=2e-5)


def test_the_contract_is_that_of_the_whole_decoder(tiny: Model) -> None:
    spec, whole = tiny.engines.decoder.spec, subgraph_specs(tiny.config)["decoder"]
    assert spec.name == whole.name
    assert {tensor.name: tensor for tensor in spec.inputs} == {tensor.name: tensor for tensor in whole.inputs}
    assert {tensor.name: tensor for tensor in spec.outputs} == {tensor.name: tensor for tensor in whole.outputs}
    assert spec.aliases == whole.aliases


def test_feeds_that_do_not_fit_are_refused_before_a_part_is_run(tiny: Model) -> None:
    tiny.generate(random_request(tiny.config, 3, 8, 1), beams=1, max_new_tokens=2)
    decoder, capacity = tiny.engines.decoder, tiny.engine.loop.cache.capacity
    ones = np.zeros((1, 1), np.int64)
    feeds = {
        "token_ids": ones, "positions": ones, "media_rows": ones, "phi": ones, "write_index": ones[0], "logit_positions": ones,
        "mask": np.ones((1, 1, 1, capacity), np.bool_), "key_positions": np.arange(capacity)[None],
    }  # fmt: skip
    before = tiny.engine.loop.cache._buffers["past_k.0"].read()
    for wrong, words in (
        ({"past_k.2": np.zeros((1, 4, capacity, 10), np.float32)}, r"decoder: past_k\.2 is updated in place: bind a buffer"),
        ({"token_ids": ones.astype(np.int32)}, "decoder: token_ids is int32, expected int64"),
        ({"logit_positions": np.zeros((2, 1), np.int64)}, r"decoder: logit_positions has shape \(2, 1\)"),
        ({"hidden": np.zeros((1, 1, 32), np.float32)}, "decoder: hidden is not an input"),
    ):
        with pytest.raises(InputError, match=words):
            decoder.run({**feeds, **wrong})
    with pytest.raises(InputError, match="decoder: token_ids is missing"):
        decoder.run({name: value for name, value in feeds.items() if name != "token_ids"})
    np.testing.assert_array_equal(tiny.engine.loop.cache._buffers["past_k.0"].read(), before)
    for call in (decoder.allocate, decoder.bind):
        with pytest.raises(InputError, match=r"decoder: past_k\.9 is not an input"):
            call("past_k.9", (1,))  # type: ignore[arg-type]
    logits = decoder.run(feeds)["logits"]
    np.testing.assert_array_equal(decoder.compute(feeds)["logits"], logits)
    assert decoder.run(feeds, outputs=("logits",)).keys() == {"logits"}
    # Feeds that were right are looked at again once another buffer is bound.
    narrow = decoder.allocate("past_k.0", (1, *tiny.engine.loop.cache._buffers["past_k.0"].shape[1:2], capacity - 1, 10))
    decoder.bind("past_k.0", narrow)
    with pytest.raises(InputError, match=r"decoder: past_k\.0 has shape"):
        decoder.run(feeds)
    decoder.bind("past_k.0", tiny.engine.loop.cache._buffers["past_k.0"])
    decoder.run(feeds)
    decoder.close()
    with pytest.raises(BackendError, match="session is closed"):
        decoder.run(feeds)


def test_what_was_opened_is_closed_where_a_part_cannot_be(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(tiny.bundle)
    opened: list[Any] = []
    closed: list[Any] = []
    backend = tiny.backend

    class Failing:
        placement = staticmethod(backend.placement)

        def open(self, bundle: Path, manifest: Any, graph: Any, options: Any) -> Any:
            if len(opened) == 4:
                raise BackendError("no room")
            session = backend.open(bundle, manifest, graph, options)
            monkeypatch.setattr(session, "close", lambda: closed.append(session))
            opened.append(session)
            return session

    with pytest.raises(BackendError, match="no room"):
        Engines.open(tiny.bundle, manifest, Failing(), SessionOptions(threads=1))  # type: ignore[arg-type]
    assert closed == opened


@pytest.mark.parametrize("config", VARIATIONS.values(), ids=VARIATIONS)
def test_every_kind_of_model(config: ModelConfig, bundle_writer: Callable[..., Path], tmp_path: Path) -> None:
    """Rotary positions and ALiBi, heads that share keys, a separate output; a layer a part."""
    source = LiveSource(drawn_model(config))
    ids = [1, config.tokens.image, 10, 11, config.tokens.image, *range(12, 30)]
    rng = np.random.default_rng(0)
    asked = Request(prompt=ids, media=list(rng.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)))
    found = []
    for parts in (1, config.language_model.num_layers):
        bundle = bundle_writer(source, tmp_path / f"{parts}.bundle", parts=parts)
        with flamingo_export.load(bundle, backend="onnxruntime", threads=1) as model:
            found.append(told([model.generate(asked, beams=3, max_new_tokens=6, num_return=3)]))
    assert found[0] == found[1]


def test_the_reference_in_parts(bundle_writer: Callable[..., Path], tiny_model: Flamingo, tmp_path: Path) -> None:
    source, found = LiveSource(tiny_model), []
    for parts in (1, 2):
        bundle = bundle_writer(source, tmp_path / f"{parts}.bundle", parts=parts)
        with Model(bundle, read_manifest(bundle), ReferenceBackend(source), SessionOptions(threads=1)) as model:
            asked = [random_request(model.config, seed, 5 + 20 * seed, seed) for seed in range(3)]
            found.append(told(model.generate(asked, beams=3, max_new_tokens=5)))
    assert found[0] == found[1]
