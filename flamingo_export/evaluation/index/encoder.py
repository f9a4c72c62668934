"""Media as vectors: the contrastive encoder's embeddings where the bundle has one, else the vision encoder's features, averaged over
positions; the mean over frames of a video, or tiles of an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flamingo_export.evaluation.protocol import Features
from flamingo_export.runtime.media import Medium, MediumSource, load_medium
from flamingo_export.specs import IMAGE_TOWER

if TYPE_CHECKING:
    from flamingo_export.backends.base import Backend, Session
    from flamingo_export.bundle.manifest import Manifest
    from flamingo_reference.arrays import Array

FRAMES_AT_ONCE = 8
READERS = 2
AHEAD = 16
"""Media that are read before their turn, at most."""


EMBEDDINGS = "image embeddings of the contrastive encoder"
MEAN_FEATURES = "mean-pooled features of the vision encoder"


def features_of(manifest: Manifest) -> str:
    """What the vectors of a bundle are, as an index and a report say it."""
    return MEAN_FEATURES if manifest.config.contrastive is None else EMBEDDINGS


class Encoder:
    """A bundle's vision encoder by itself, with its image tower where it has one."""

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, *, threads: int = 0) -> None:
        """Opens the graph. Raises BackendError."""
        from flamingo_export.backends.base import SessionOptions

        self._config, self._fit = manifest.config, manifest.inputs.fit
        options = SessionOptions(threads=threads)
        self._session: Session = backend.open(bundle, manifest, manifest.graph("vision_encoder"), options)
        self._tower: Session | None = None
        if manifest.config.contrastive is not None:
            self._tower = backend.open(bundle, manifest, manifest.graph(IMAGE_TOWER), options)
        self._at_once = min(FRAMES_AT_ONCE, self._session.largest.get("F", FRAMES_AT_ONCE))

    def encode(self, media: Iterable[MediumSource]) -> Features:
        """float32 [N, E], or [N, J] of embeddings. Raises ImageError for media that cannot be read."""
        found = list(self.stream(media))
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def stream(self, media: Iterable[MediumSource]) -> Iterator[Features]:
        """A vector [E] for each medium, in order; frames of several media are encoded together, images of tiles one by one."""
        waiting: list[Features] = []
        lengths: list[int] = []
        for medium in self._loaded(media):
            if self._config.tiled is not None:
                yield self._mean_of_tiles(medium)
                continue
            waiting.append(medium.pixels)
            lengths.append(len(medium.pixels))
            if sum(lengths) >= self._at_once:
                yield from self._means(waiting, lengths)
                waiting, lengths = [], []
        if waiting:
            yield from self._means(waiting, lengths)

    def _loaded(self, media: Iterable[MediumSource]) -> Iterator[Medium]:
        """Each medium, in order, the next ones being read while the graph runs."""

        def load(medium: MediumSource) -> Medium:
            return load_medium(medium, self._config, self._fit)

        with ThreadPoolExecutor(READERS) as readers:
            ahead: deque[Future[Medium]] = deque()
            try:
                for medium in media:
                    ahead.append(readers.submit(load, medium))
                    if len(ahead) > AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for each in ahead:
                    each.cancel()

    def close(self) -> None:
        """Frees the graph."""
        self._session.close()
        if self._tower is not None:
            self._tower.close()

    def _mean_of_tiles(self, medium: Medium) -> Features:
        """Of the tiles that show something, [E]."""
        feeds: dict[str, Array] = {"pixels": medium.pixels, "aspect_ratio_ids": np.array([medium.aspect], np.int64)}
        features = self._session.run(feeds)["features"][0, : medium.rows]
        mean: Features = features.astype(np.float32).mean(axis=(0, 1))
        return mean

    def _means(self, pixels: Sequence[Features], lengths: Sequence[int]) -> Iterator[Features]:
        frames = np.concatenate(pixels)
        means = np.concatenate(
            [self._vectors(frames[start : start + self._at_once]) for start in range(0, len(frames), self._at_once)]
        )
        start = 0
        for length in lengths:
            mean: Features = means[start : start + length].mean(axis=0)
            yield mean
            start += length

    def _vectors(self, frames: Features) -> Features:
        """[F, E or J] of at most `_at_once` frames."""
        if self._tower is None:
            features = self._session.run({"pixels": frames}, ("features",))["features"]
            means: Features = features.astype(np.float32).mean(axis=1)
            return means
        pooled = self._session.run({"pixels": frames}, ("pooled",))["pooled"]
        embeddings: Features = self._tower.run({"pooled": pooled})["image_embedding"].astype(np.float32)
        return embeddings
