"""Media to keys and values: vision encoder, resampler, media_kv, in batches of bounded size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flamingo_export.backends.base import Array, Session
from flamingo_export.runtime.media import Medium
from flamingo_reference.config import ModelConfig
from flamingo_reference.time_weights import time_weights

MAX_FRAMES_AT_ONCE = 8
"""Frames of one call: enough to keep the cores busy, few enough that a large encoder's activations stay small."""


class MediaEncoder:
    """Runs the three media subgraphs."""

    def __init__(self, vision_encoder: Session, resampler: Session, media_kv: Session, config: ModelConfig) -> None:
        self._vision_encoder, self._resampler, self._media_kv = vision_encoder, resampler, media_kv
        self._config = config

    def encode(self, media: Sequence[Medium]) -> Iterator[tuple[Medium, Mapping[str, Array]]]:
        """Each medium with its media_k.i and media_v.i [Hx, R, Dx]; media with equally many frames are encoded together."""
        by_length: defaultdict[int, list[Medium]] = defaultdict(list)
        for medium in media:
            by_length[len(medium.pixels)].append(medium)
        for num_frames, group in by_length.items():
            together = max(1, MAX_FRAMES_AT_ONCE // num_frames)
            for start in range(0, len(group), together):
                batch = group[start : start + together]
                values = self._media_kv.run({"latents": self.latents(batch)})
                for index, medium in enumerate(batch):
                    yield medium, {name: value[index] for name, value in values.items()}

    def latents(self, media: Sequence[Medium]) -> Array:
        """Latents float32 [N, R, W] of media with the same number of frames."""
        pixels = np.stack([medium.pixels for medium in media])
        num_media, num_frames = pixels.shape[:2]
        flat = pixels.reshape(num_media * num_frames, *pixels.shape[2:])
        parts = [
            self._vision_encoder.run({"pixels": flat[start : start + MAX_FRAMES_AT_ONCE]})["features"]
            for start in range(0, len(flat), MAX_FRAMES_AT_ONCE)
        ]
        features = parts[0] if len(parts) == 1 else np.concatenate(parts)
        feeds = {"features": features.reshape(num_media, num_frames, *features.shape[1:])}
        if self._config.resampler.num_time_embeddings:
            feeds["time_weights"] = time_weights(num_frames, self._config.resampler.num_time_embeddings)
        return self._resampler.run(feeds)["latents"]
