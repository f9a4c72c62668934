"""Media to keys and values: vision encoder, resampler, media_kv, in calls of bounded size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flamingo_export.backends.base import Session, Tensor
from flamingo_export.errors import InputError
from flamingo_export.runtime.media import Medium
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig
from flamingo_reference.time_weights import time_weights

MAX_FRAMES_AT_ONCE = 8
"""Frames of one call: enough to keep the cores busy, few enough that a large encoder's activations stay small. Engines may take fewer."""

Encoded = tuple[Medium, Sequence[Mapping[str, Tensor]]]
"""A medium with the media_k.i and media_v.i [Hx, R, Dx] of each of its rows."""


class MediaEncoder:
    """Runs the three media subgraphs. What passes from one to the next stays where the backend has it."""

    def __init__(self, vision_encoder: Session, resampler: Session, media_kv: Session, config: ModelConfig) -> None:
        self._vision_encoder, self._resampler, self._media_kv = vision_encoder, resampler, media_kv
        self._config = config
        self.asynchronous = vision_encoder.asynchronous
        self.frames = min(MAX_FRAMES_AT_ONCE, vision_encoder.largest.get("F", MAX_FRAMES_AT_ONCE))
        """Frames of one call at most."""

    def check(self, media: Sequence[Medium]) -> None:
        """Raises InputError for a video of more frames than the engines take."""
        most = self._resampler.largest.get("T")
        longest = max((len(medium.pixels) for medium in media), default=0)
        if most is not None and longest > most:
            raise InputError(
                f"a video of {longest} frames was given, the engines take {most}. Show fewer (--num-frames), or build them with more "
                "(limits=ShapeLimits(video_frames=...))."
            )

    def encode(self, media: Sequence[Medium]) -> Iterator[Encoded]:
        """Each medium with its keys and values; media with equally many frames are encoded together."""
        encoding = Encoding(self, media)
        while encoding.remaining:
            yield from encoding.step(self.frames)

    def features(self, pixels: Array) -> Tensor:
        """Features [F, P, E] of at most `frames` frames."""
        return self._vision_encoder.compute({"pixels": pixels})["features"]

    def host_features(self, pixels: Array) -> Array:
        """As `features`, on the host: those of a long video are put together there, which is a matter of milliseconds."""
        return self._vision_encoder.run({"pixels": pixels})["features"]

    def keys_and_values(self, media: Sequence[Medium], features: Tensor) -> Iterator[Encoded]:
        """From the features [N * T, P, E] of media with T frames each."""
        latents = self.latents_of(features, len(media))
        values = self._media_kv.compute({"latents": latents})
        for index, medium in enumerate(media):
            yield medium, [{name: value[index] for name, value in values.items()}]

    def tiles(self, medium: Medium) -> list[Mapping[str, Tensor]]:
        """Keys and values of each tile of an image, one after the other: they have thousands of keys. What only fills it up gets none."""
        feeds: dict[str, Tensor] = {"pixels": medium.pixels, "aspect_ratio_ids": np.array([medium.aspect], np.int64)}
        features = self._vision_encoder.compute(feeds)["features"]
        features = features.reshape(*features.shape[1:])  # [Tmax, P, E]
        found: list[Mapping[str, Tensor]] = []
        for tile in range(medium.rows):
            one = features[tile]
            latents = self._resampler.compute({"features": one.reshape(1, 1, *one.shape)})["latents"]
            values = self._media_kv.compute({"latents": latents})
            found.append({name: value[0] for name, value in values.items()})
        return found

    def latents_of(self, features: Tensor, num_media: int) -> Tensor:
        """Latents [N, R, W] of media, from the features [N * T, P, E] of their frames."""
        num_frames = features.shape[0] // num_media
        feeds: dict[str, Tensor] = {"features": features.reshape(num_media, num_frames, *features.shape[1:])}
        if self._config.resampler.num_time_embeddings:
            feeds["time_weights"] = time_weights(num_frames, self._config.resampler.num_time_embeddings)
        return self._resampler.compute(feeds)["latents"]


class Encoding:
    """The encoding of some media, a call of the vision encoder at a time."""

    def __init__(self, encoder: MediaEncoder, media: Sequence[Medium]) -> None:
        self._encoder = encoder
        by_length: defaultdict[int, list[Medium]] = defaultdict(list)
        for medium in media:
            by_length[len(medium.pixels)].append(medium)
        self.remaining = [medium for group in by_length.values() for medium in group]
        """Media that are not encoded yet; those with equally many frames side by side."""
        self._features: list[Array] = []
        """Of the first of them, as far as a video longer than a call has come."""

    def step(self, frames: int) -> list[Encoded]:
        """One call of at most `frames` frames, or of an image of tiles. Returns the media that it completes, often none for a video."""
        first = self.remaining[0]
        length = len(first.pixels)
        if first.aspect:
            del self.remaining[0]
            return [(first, self._encoder.tiles(first))]
        if self._features or length > frames:
            done = sum(len(features) for features in self._features)
            self._features.append(self._encoder.host_features(first.pixels[done : done + frames]))
            if done + frames < length:
                return []
            whole, batch = np.concatenate(self._features), [first]
            self._features = []
            found = list(self._encoder.keys_and_values(batch, whole))
        else:
            most = max(1, frames // length)
            batch = [medium for medium in self.remaining[:most] if len(medium.pixels) == length]
            pixels = np.concatenate([medium.pixels for medium in batch])
            found = list(self._encoder.keys_and_values(batch, self._encoder.features(pixels)))
        del self.remaining[: len(batch)]
        return found
