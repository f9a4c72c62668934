"""Media as vectors: the contrastive encoder's embeddings where the bundle has one, else the vision encoder's features, averaged over
positions; the mean over frames of a video, or tiles of an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, LifoQueue
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from flamingo_export.backends.base import SessionOptions
from flamingo_export.evaluation.protocol import Features
from flamingo_export.machine import physical_cores
from flamingo_export.runtime.media import Medium, MediumSource, load_medium
from flamingo_export.runtime.videos import Video
from flamingo_export.specs import IMAGE_TOWER
from flamingo_reference.names import parameter_counts

if TYPE_CHECKING:
    from flamingo_export.backends.base import Backend, Session
    from flamingo_export.bundle.manifest import Manifest
    from flamingo_reference.arrays import Array

Found = TypeVar("Found")

FRAMES_AT_ONCE = 8
SMALL_AT_ONCE = 16
"""Of an encoder that runs several times side by side: a small one, whose batches take little memory."""
READERS = 2
AHEAD = 16
"""Media that are read before their turn, at most, where one batch is encoded at a time."""
COPIES_BYTES = 512 * 2**20
"""Of fp32 weights that a small encoder's copies may have together."""


EMBEDDINGS = "image embeddings of the contrastive encoder"
MEAN_FEATURES = "mean-pooled features of the vision encoder"


def features_of(manifest: Manifest) -> str:
    """What the vectors of a bundle are, as an index and a report say it."""
    return MEAN_FEATURES if manifest.config.contrastive is None else EMBEDDINGS


@dataclass(frozen=True)
class _Opened:
    """The vision encoder, and the image tower where there is one. One thread at a time."""

    vision: Session
    tower: Session | None

    def close(self) -> None:
        self.vision.close()
        if self.tower is not None:
            self.tower.close()


class Encoder:
    """A bundle's vision encoder by itself, with its image tower where it has one.

    Cores share the small products of a small encoder poorly. Where the backend computes on threads of the host, such a one has a copy a core:
    batches run side by side, each on one thread that reads its files too. A large encoder has all cores for one batch, and the next media
    are read meanwhile.
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, options: SessionOptions | None = None) -> None:
        """Opens the graphs. Raises BackendError."""
        self._config, self._fit = manifest.config, manifest.inputs.fit
        self._bundle, self._manifest, self._backend = bundle, manifest, backend
        wanted = options or SessionOptions()
        cores = wanted.threads or physical_cores()
        on_host = backend.capabilities.host_threads and wanted.gpu is None
        self.copies = _copies(manifest, cores) if on_host else 1
        self._options = wanted if self.copies == 1 else msgspec.structs.replace(wanted, threads=max(1, cores // self.copies))
        self._free: LifoQueue[_Opened] = LifoQueue()
        self._every: list[_Opened] = []
        with self._opened() as first:
            most = FRAMES_AT_ONCE if self.copies == 1 else SMALL_AT_ONCE
            self.at_once = min(most, first.vision.largest.get("F", most))

    def encode(self, media: Iterable[MediumSource]) -> Features:
        """float32 [N, E], or [N, J] of embeddings. Raises ImageError for media that cannot be read."""
        found = list(self.stream(media))
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def stream(self, media: Iterable[MediumSource]) -> Iterator[Features]:
        """A vector [E] for each medium, in order. Images are encoded `at_once`, a video's frames and an image's tiles by themselves."""
        batches = self._batches(media)
        if self.copies > 1:
            made = (partial(self._vectors_of, batch) for batch in batches)
            for vectors in _in_order(made, threads=self.copies, ahead=self.copies):
                yield from vectors
            return
        sizes: deque[int] = deque()

        def loads() -> Iterator[Callable[[], Medium]]:
            for batch in batches:
                sizes.append(len(batch))
                yield from (partial(self._loaded, medium) for medium in batch)

        waiting: list[Medium] = []
        for medium in _in_order(loads(), threads=READERS, ahead=AHEAD):
            waiting.append(medium)
            if len(waiting) == sizes[0]:
                yield from self._vectors(waiting)
                waiting = []
                sizes.popleft()

    def close(self) -> None:
        """Frees the graphs."""
        for each in self._every:
            each.close()
        self._every.clear()

    def _batches(self, media: Iterable[MediumSource]) -> Iterator[list[MediumSource]]:
        images: list[MediumSource] = []
        for medium in media:
            by_itself = isinstance(medium, Video) or self._config.tiled is not None
            if images and (by_itself or len(images) == self.at_once):
                yield images
                images = []
            if by_itself:
                yield [medium]
            else:
                images.append(medium)
        if images:
            yield images

    def _loaded(self, medium: MediumSource) -> Medium:
        return load_medium(medium, self._config, self._fit, digest=False)

    def _vectors_of(self, batch: Sequence[MediumSource]) -> Features:
        return self._vectors([self._loaded(medium) for medium in batch])

    def _vectors(self, media: Sequence[Medium]) -> Features:
        """[N, E or J] of a batch."""
        with self._opened() as opened:
            if self._config.tiled is not None:
                return np.stack([_mean_of_tiles(opened.vision, medium) for medium in media])
            frames = np.concatenate([medium.pixels for medium in media])
            found = [_of_frames(opened, frames[start : start + self.at_once]) for start in range(0, len(frames), self.at_once)]
        vectors = np.concatenate(found)
        return vectors if len(vectors) == len(media) else vectors.mean(axis=0, keepdims=True)

    @contextmanager
    def _opened(self) -> Iterator[_Opened]:
        """Graphs that no other thread uses, opened if there are none free."""
        try:
            opened = self._free.get_nowait()
        except Empty:
            opened = self._open()
        try:
            yield opened
        finally:
            self._free.put(opened)

    def _open(self) -> _Opened:
        def session(name: str) -> Session:
            return self._backend.open(self._bundle, self._manifest, self._manifest.graph(name), self._options)

        vision = session("vision_encoder")
        opened = _Opened(vision, session(IMAGE_TOWER) if self._config.contrastive is not None else None)
        self._every.append(opened)
        return opened


def _copies(manifest: Manifest, cores: int) -> int:
    """How often an encoder is opened: once where its size is not known, a module of the user's own."""
    count = parameter_counts(manifest.config).get("vision_encoder", 0)
    return max(1, min(cores, COPIES_BYTES // (4 * count))) if count else 1


def _in_order(calls: Iterable[Callable[[], Found]], *, threads: int, ahead: int) -> Iterator[Found]:
    """What calls give, in their order, while up to `ahead` later ones are run or wait for a thread."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Found]] = deque()
        try:
            for call in calls:
                running.append(pool.submit(call))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for each in running:
                each.cancel()


def _of_frames(opened: _Opened, frames: Features) -> Features:
    """[F, E or J] of as many frames as the graphs take at once."""
    if opened.tower is None:
        features = opened.vision.run({"pixels": frames}, ("features",))["features"]
        means: Features = features.astype(np.float32).mean(axis=1)
        return means
    pooled = opened.vision.run({"pixels": frames}, ("pooled",))["pooled"]
    embeddings: Features = opened.tower.run({"pooled": pooled})["image_embedding"].astype(np.float32)
    return embeddings


def _mean_of_tiles(vision: Session, medium: Medium) -> Features:
    """Of the tiles that show something, [E]."""
    feeds: dict[str, Array] = {"pixels": medium.pixels, "aspect_ratio_ids": np.array([medium.aspect], np.int64)}
    features = vision.run(feeds)["features"][0, : medium.rows]
    mean: Features = features.astype(np.float32).mean(axis=(0, 1))
    return mean
