"""Runs parity's cases on a backend's sessions: the decoder whole, or part by part with one session open at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np

from flamingo_export.backends.base import Backend, Buffer, Session, SessionOptions
from flamingo_export.backends.host_memory import release
from flamingo_export.bundle.manifest import GraphRecord, Manifest
from flamingo_export.errors import ParityError
from flamingo_export.specs import gated_in
from flamingo_export.validate.expected.cases import DecoderCase, image_rows
from flamingo_export.validate.expected.decoder_calls import Plan
from flamingo_export.validate.expected.media_rounding import MediaFormat
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig

Bank = Callable[[int], tuple[Array, Array]]
"""media_k.i and media_v.i float32 [N, Hx, R, Dx] of gated layer i."""
Hidden = Mapping[int, Array]
"""For each sequence, hidden states [its length, W]; NaN where nothing was fed."""


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """output: for each sequence [its length, W or V], NaN at positions that were not fed. caches: past_k.j, past_v.j at the end."""

    output: dict[int, Array]
    caches: dict[str, Array]


def bank_of(config: ModelConfig, case: DecoderCase, media: MediaFormat, encoded: Mapping[str, Array] | None) -> Bank:
    """The bank that a case's requests share: drawn, or what the engine's media_kv made of the end-to-end case's frames."""
    if not case.from_pixels:
        return lambda i: media.drawn(config, i, image_rows(config, case.bank_rows - 1).stop)
    if encoded is None:
        raise ParityError(f"case {case.name!r} needs encoded frames, and the encoders failed")
    return lambda i: (encoded[f"media_k.{i}"], encoded[f"media_v.{i}"])


def run_stage(
    session: Session, config: ModelConfig, plan: Plan, media: MediaFormat, bank: Bank, *, layers: range, hidden: Hidden | None
) -> StageResult:
    """All calls of a case through the decoder, or the part of it with these LM layers (fed with `hidden` unless it is the first)."""
    spec = session.spec
    for i, _ in gated_in(config, layers):
        for kind, values in zip("kv", bank(i), strict=True):
            name = f"media_{kind}.{i}"
            buffer = session.allocate(name, values.shape)
            for row, value in enumerate(media.codes(name, values) if spec.input(name).kind == "fp8" else values):
                buffer.write(row, value)
            session.bind(name, buffer)
    lm = config.language_model
    # An engine has one capacity, larger than what the case needs.
    capacity = session.largest.get("C", plan.capacity)
    caches: dict[str, Buffer] = {
        name: session.allocate(name, (plan.batch, lm.kv_heads, capacity, lm.head_size)) for name in spec.aliases.values()
    }
    wanted = {tensor.name for tensor in spec.inputs}
    last = layers.stop == lm.num_layers
    output = {
        index: np.full((len(sequence.tokens), lm.vocab_size if last else lm.width), np.nan, np.float32)
        for index, sequence in enumerate(plan.sequences)
    }
    for call in plan.calls:
        batch, width = call.token_ids.shape
        feeds: dict[str, Array] = {name: _widened(name, call.feeds[name], capacity) for name in call.feeds if name in wanted}
        if hidden is None:
            feeds["token_ids"] = call.token_ids
        else:
            feeds["hidden"] = _gathered(call.origin, hidden, lm.width)
        if last:
            feeds["logit_positions"] = np.tile(np.arange(width, dtype=np.int64), (batch, 1))
        for name, cache in caches.items():
            session.bind(name, cache.rows(0, batch))
        results = session.run(feeds, outputs=("logits" if last else "hidden_out",))
        values = results["logits" if last else "hidden_out"]
        for b, s in np.argwhere(call.origin[:, :, 0] >= 0).tolist():
            sequence, position = call.origin[b, s].tolist()
            output[sequence][position] = values[b, s]
    return StageResult(output=output, caches={name: cache.read() for name, cache in caches.items()})


def _widened(name: str, value: Array, capacity: int) -> Array:
    """Mask and key positions of a case for a cache with more slots, which nothing sees."""
    missing = capacity - value.shape[-1] if name in ("mask", "key_positions") else 0
    return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)]) if missing > 0 else value


def _gathered(origin: Array, hidden: Hidden, width: int) -> Array:
    batch, length = origin.shape[:2]
    gathered = np.zeros((batch, length, width), np.float32)
    for b, s in np.argwhere(origin[:, :, 0] >= 0).tolist():
        sequence, position = origin[b, s].tolist()
        gathered[b, s] = hidden[sequence][position]
    return gathered


def cached(plan: Plan, cache: Array, sequence: int) -> Array:
    """What the cache [B, H, C, D] holds of a sequence's own positions, in order: [H, positions, D]."""
    where = [
        (position, b, c) for b, c in np.argwhere(plan.slots[:, :, 0] == sequence).tolist() for position in [plan.slots[b, c, 1]]
    ]
    return np.stack([cache[b, :, c] for _, b, c in sorted(where)], axis=1)


@contextlib.contextmanager
def opened(
    backend: Backend, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions
) -> Iterator[Session]:
    """A session for the length of a `with` block."""
    session = backend.open(bundle, manifest, graph, options)
    try:
        yield session
    finally:
        session.close()
        release()


@contextlib.contextmanager
def layer_session(
    backend: Backend, bundle: Path, manifest: Manifest, layer: int, folder: Path, options: SessionOptions
) -> Iterator[Session]:
    """A session of one LM layer, cut out of the bundle's decoder, on the bundle's own weights. Its graph lies in `folder` while it is open."""
    from flamingo_export.graphs import save_graph
    from flamingo_export.validate.checks.layer_graph import layer_graph

    name = f"decoder.layer{layer}"
    path = (folder / f"{name}.onnx").resolve()
    record = GraphRecord(name=name, file=str(path), layers=(layer, layer + 1))
    try:
        save_graph(layer_graph(bundle, manifest, layer, name=name), path)
        backend.build(bundle, manifest, record)
        with opened(backend, bundle, manifest, record, options) as session:
            yield session
    finally:
        path.unlink(missing_ok=True)
