"""A bundle's engines driven as the runtime does, on pixels and token ids given as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.runtime.candidates import run_decoder
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.media_encoder import MediaEncoder
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Prepared, prepared_from_ids
from flamingo_export.runtime.search import Hypothesis
from flamingo_export.runtime.subgraphs import Engines


class EngineRuns:
    """The opened engines of a bundle, on ONNX Runtime with one thread."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = open_bundle(bundle)
        self.config = self.manifest.config
        self.engines = Engines.open(bundle, self.manifest, get_backend("onnxruntime"), SessionOptions(threads=1))

    def logits(self, tokens: list[int], images: torch.Tensor, aspects: Sequence[int] = ()) -> np.ndarray:
        """float32 [S, V] at every position of one request; images [M, 3, I, I], or [M, Tmax, 3, I, I] with their aspect-ratio ids."""
        engines, decoder = self.engines, self.engines.decoder
        encoder = MediaEncoder(engines.vision_encoder, engines.resampler, engines.media_kv, self.config)
        prepared = self.prepared(tokens, images, aspects)
        rows = [row for _, rows in encoder.encode(prepared.media) for row in rows]
        length = len(tokens)
        for tensor in decoder.spec.inputs:
            if tensor.name.startswith(("media_k.", "media_v.")):
                buffer = decoder.allocate(tensor.name, (max(1, len(rows)), *map(int, tensor.shape[1:])))
                for row, values in enumerate(rows):
                    buffer.write(row, values[tensor.name])
                decoder.bind(tensor.name, buffer)
            elif tensor.name.startswith("past_"):
                _, heads, _, size = tensor.shape
                decoder.bind(tensor.name, decoder.allocate(tensor.name, (1, int(heads), length, int(size))))
        places = np.arange(length)[None]
        feeds = {
            "token_ids": prepared.token_ids[None],
            "positions": places,
            "media_rows": np.arange(max(1, len(rows)))[None],
            "phi": prepared.phi[None],
            "first_media": (prepared.phi if prepared.first is None else prepared.first)[None],
            "write_index": np.zeros(1, np.int64),
            "mask": np.tri(length, dtype=np.bool_)[None, None],
            "key_positions": places,
            "logit_positions": places,
        }
        return np.asarray(run_decoder(decoder, feeds, None)[0])

    def engine(self, **limits: int) -> Engine:
        """The runtime's engine, whose cache and bank are empty. limits: in place of the bundle's."""
        return Engine(self.engines, self.config, msgspec.structs.replace(self.manifest.limits, **limits))

    def generate(
        self, tokens: list[int], images: torch.Tensor, aspects: Sequence[int] = (), *, beams: int, new_tokens: int
    ) -> list[Hypothesis]:
        """The runtime's own loop, best hypothesis first."""
        engine = self.engine()
        options = GenerateOptions(beams=beams, max_new_tokens=new_tokens)
        (outcome,) = engine.complete(engine.submit(self.prepared(tokens, images, aspects), options, wake=False))
        return outcome.hypotheses

    def prepared(self, tokens: Sequence[int], images: torch.Tensor, aspects: Sequence[int] = ()) -> Prepared:
        """A request for these tokens."""
        return prepared_from_ids(np.array(tokens), self.media(images, aspects), self.config)

    def media(self, images: torch.Tensor, aspects: Sequence[int] = ()) -> tuple[Medium, ...]:
        """Images [M, 3, I, I] as media of one frame, or [M, Tmax, 3, I, I] as tiles; equal images are one medium."""
        found = []
        for index, image in enumerate(images):
            pixels = image[None].float().numpy()
            aspect = aspects[index] if self.config.tiled is not None else 0
            rows = self.config.tiled.num_tiles(aspect) if self.config.tiled is not None else 1
            digest = hashlib.sha256(pixels.tobytes() + bytes([aspect])).digest()
            found.append(Medium(pixels=pixels, digest=digest, rows=rows, aspect=aspect))
        return tuple(found)


@contextmanager
def opened(bundle: Path) -> Iterator[EngineRuns]:
    """The engines for the length of a `with` block."""
    runs = EngineRuns(bundle)
    try:
        yield runs
    finally:
        runs.engines.close()


def assert_as_exact(found: np.ndarray, exact: torch.Tensor, eager: torch.Tensor) -> None:
    """The engine's error against transformers in fp64 is at most what the table of tolerances allows beside transformers in fp32."""
    from flamingo_export.validate.tolerances import tolerance

    wanted = exact.double().numpy()
    rms = float(np.sqrt(np.mean(wanted**2)))
    error, own = (float(np.abs(each - wanted).max()) / rms for each in (found, eager.double().numpy()))
    assert error <= tolerance("decoder").limit(torch_error=own, peak=float(np.abs(wanted).max()) / rms), (error, own)
