"""Media to keys and values: vision encoder, resampler, media_kv, in batches of bounded size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flamingo_export.backends.base import Array, Session, Tensor
from flamingo_export.errors import InputError
from flamingo_export.runtime.media import Medium
from flamingo_reference.config import ModelConfig
from flamingo_reference.time_weights import time_weights

MAX_FRAMES_AT_ONCE = 8
"""Frames of one call: enough to keep the cores busy, few enough that a large encoder's activations stay small. Engines may take fewer."""


class MediaEncoder:
    """Runs the three media subgraphs. What passes from one to the next stays where the backend has it."""

    def __init__(self, vision_encoder: Session, resampler: Session, media_kv: Session, config: ModelConfig) -> None:
        self._vision_encoder, self._resampler, self._media_kv = vision_encoder, resampler, media_kv
        self._config = config
        self.asynchronous = vision_encoder.asynchronous
        self._frames = min(MAX_FRAMES_AT_ONCE, vision_encoder.largest.get("F", MAX_FRAMES_AT_ONCE))

    def check(self, media: Sequence[Medium]) -> None:
        """Raises InputError for a video of more frames than the engines take."""
        most = self._resampler.largest.get("T")
        longest = max((len(medium.pixels) for medium in media), default=0)
        if most is not None and longest > most:
            raise InputError(
                f"a video of {longest} frames was given, the engines take {most}. Show fewer (--num-frames), or build them with more "
                "(limits=ShapeLimits(video_frames=...))."
            )

    def encode(self, media: Sequence[Medium]) -> Iterator[tuple[Medium, Mapping[str, Tensor]]]:
        """Each medium with its media_k.i and media_v.i [Hx, R, Dx]; media with equally many frames are encoded together."""
        by_length: defaultdict[int, list[Medium]] = defaultdict(list)
        for medium in media:
            by_length[len(medium.pixels)].append(medium)
        for num_frames, group in by_length.items():
            together = max(1, self._frames // num_frames)
            for start in range(0, len(group), together):
                batch = group[start : start + together]
                values = self._media_kv.compute({"latents": self.latents(batch)})
                for index, medium in enumerate(batch):
                    yield medium, {name: value[index] for name, value in values.items()}

    def latents(self, media: Sequence[Medium]) -> Tensor:
        """Latents [N, R, W] of media with the same number of frames."""
        pixels = np.stack([medium.pixels for medium in media])
        num_media, num_frames = pixels.shape[:2]
        flat = pixels.reshape(num_media * num_frames, *pixels.shape[2:])
        features = self._features(flat)
        feeds: dict[str, Tensor] = {"features": features.reshape(num_media, num_frames, *features.shape[1:])}
        if self._config.resampler.num_time_embeddings:
            feeds["time_weights"] = time_weights(num_frames, self._config.resampler.num_time_embeddings)
        return self._resampler.compute(feeds)["latents"]

    def _features(self, pixels: Array) -> Tensor:
        """Features [F, P, E]. Those of a video longer than one call takes are put together on the host: it is a matter of milliseconds."""
        if len(pixels) <= self._frames:
            return self._vision_encoder.compute({"pixels": pixels})["features"]
        calls = (pixels[start : start + self._frames] for start in range(0, len(pixels), self._frames))
        return np.concatenate([self._vision_encoder.run({"pixels": call})["features"] for call in calls])
