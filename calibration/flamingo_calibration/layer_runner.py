"""All samples through the reference, one part of the model after the other.

    pixels -- vision_encoder --> features -- resampler --> latents --------------,
                                 `-- [contrastive.readout] --> pooled -- contrastive.image        of a contrastive encoder,
    texts -- contrastive.text                                                                     as is its text tower
    token ids -- language_model --> hidden -- [cross_attention.i] -- language_model.layers.j --> ... -- norm --> input of the head

A part's weights are read once, all samples go through it, and what comes out waits on the disk for the next part. So memory is that of the
largest part and one sample, whatever the model and the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flamingo_calibration.samples import Checked
from flamingo_calibration.streams import Shapes, Stream, Work
from flamingo_export.runtime.media import load_medium
from flamingo_export.sources import WeightSource
from flamingo_reference.arrays import Floats32
from flamingo_reference.contrastive_config import ClassToken, Readout
from flamingo_reference.names import pooled_width
from flamingo_reference.time_weights import time_weights

if TYPE_CHECKING:
    from torch import Tensor


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the model on its way: the stream it writes (None: nothing comes out) with the shapes in it, and what makes one of them.

    hidden: the stream of hidden states that it continues from, None of the parts before the first layer. reads: names of the streams
    that it reads beside that.
    """

    prefix: str
    output: str | None
    shapes: Shapes
    run: Callable[[Any, int], Any]
    hidden: Stream | None = None
    reads: tuple[str, ...] = ()


class Walk:
    """The way of checked samples through a source's model, its streams in a folder."""

    def __init__(self, source: WeightSource, checked: Checked, work: Work) -> None:
        self.source, self.config, self.checked, self.work = source, source.config, checked, work
        self.media = [medium for sample in checked.samples for medium in sample.media]
        self.first_medium = np.cumsum([0, *(len(sample.media) for sample in checked.samples)]).tolist()

    def needed(self, steps: list[Step], number: int) -> list[Stream]:
        """The streams that part `number` and those after it read of the parts before it."""
        written = {step.output: step for step in steps[:number] if step.output is not None}
        wanted = {name for step in steps[number:] for name in step.reads}
        hidden = {step.hidden.path for step in steps[number:] if step.hidden is not None}
        streams = {name: self.work.stream(name, step.shapes) for name, step in written.items()}
        return [stream for name, stream in streams.items() if name in wanted or stream.path in hidden]

    def steps(self) -> Iterator[Step]:
        """The parts in order."""
        config, samples = self.config, self.checked.samples
        frames = [count for sample in samples for count in (sample.frames if config.tiled is None else sample.rows)]
        token = int(self._class_token)
        features = [(count, config.vision.num_patches + token, config.vision.feature_width) for count in frames]
        rows = [count for sample in samples for count in sample.rows]
        latents = [(count, config.resampler.num_latents, config.resampler.width) for count in rows]
        hidden = [(len(sample.token_ids), config.language_model.width) for sample in samples]
        yield Step(prefix="vision_encoder", output="features", shapes=features, run=self._encode)
        seen = self.work.stream("features", features)
        yield from self._towers(seen, frames)
        yield Step(
            prefix="resampler",
            output="latents",
            shapes=latents,
            run=lambda m, i: self._resample(m, seen.read(i)[:, token:]),
            reads=("features",),
        )
        known = self.work.stream("latents", latents)
        last = self.work.stream("hidden.0", hidden)
        yield Step(prefix="language_model", output="hidden.0", shapes=hidden, run=self._embed)
        count = 0
        for layer in range(config.language_model.num_layers):
            if layer in config.gated_layers:
                prefix, name = f"cross_attention.{config.gated_layers.index(layer)}", f"hidden.{(count := count + 1)}"
                yield Step(
                    prefix=prefix, output=name, shapes=hidden, run=self._gated(last, known), hidden=last, reads=("latents",)
                )
                last = self.work.stream(name, hidden)
            prefix, name = f"language_model.layers.{layer}", f"hidden.{(count := count + 1)}"
            yield Step(prefix=prefix, output=name, shapes=hidden, run=self._layer(last), hidden=last)
            last = self.work.stream(name, hidden)
        yield Step(prefix="language_model", output=None, shapes=hidden, run=self._head(last), hidden=last)

    def _towers(self, seen: Stream, frames: Sequence[int]) -> Iterator[Step]:
        """The parts of a contrastive encoder: the readout of pooled features, the image tower and the text tower, where there are these."""
        import torch

        config, contrastive = self.config, self.config.contrastive
        if contrastive is None:
            return
        pooling, texts = contrastive.pooling, self.checked.texts
        joint = [(count, contrastive.joint_width) for count in frames]
        if isinstance(pooling, Readout):
            shapes = [(count, pooled_width(config, contrastive)) for count in frames]
            yield Step(
                prefix="contrastive.readout",
                output="pooled",
                shapes=shapes,
                run=lambda m, i: m(torch.from_numpy(seen.read(i))[:, None]).flatten(1),
                reads=("features",),
            )
            read = self.work.stream("pooled", shapes)
            yield Step(
                prefix="contrastive.image",
                output="image_embedding",
                shapes=joint,
                run=lambda m, i: m(torch.from_numpy(read.read(i))),
                reads=("pooled",),
            )
        else:
            token = self._class_token

            def embedded(module: Any, index: int) -> Tensor:
                features = torch.from_numpy(seen.read(index))
                found: Tensor = module(features[:, 0] if token else features.mean(1))
                return found

            yield Step(prefix="contrastive.image", output="image_embedding", shapes=joint, run=embedded, reads=("features",))
        if texts:
            yield Step(
                prefix="contrastive.text",
                output="text_embedding",
                shapes=[(1, contrastive.joint_width)] * len(texts),
                run=lambda m, i: m(torch.from_numpy(texts[i][None]), torch.tensor([len(texts[i])])),
            )

    @property
    def _class_token(self) -> bool:
        """Whether a medium's features begin with the class token, which a contrastive encoder reads and the resampler does not."""
        contrastive = self.config.contrastive
        return contrastive is not None and isinstance(contrastive.pooling, ClassToken)

    def _encode(self, module: Any, index: int) -> Tensor:
        """Features of one medium, frame by frame: an encoder of 320 pixels takes much memory for each. Of an image of tiles, those of the tiles
        that there are."""
        import torch

        medium = load_medium(self.media[index], self.config, self.source.inputs.fit)
        if medium.aspect:
            features: Tensor = module(torch.from_numpy(medium.pixels), torch.tensor([medium.aspect]))[0, : medium.rows]
            return features
        frames = [torch.from_numpy(frame[None]) for frame in medium.pixels]
        if not self._class_token:
            return torch.cat([module(frame) for frame in frames])
        tokens = [module.tokens(frame) for frame in frames]
        return torch.cat([torch.cat([each[:, :1], module.features_of(each)], 1) for each in tokens])

    def _resample(self, module: Any, features: Floats32) -> Tensor:
        import torch

        embeddings = self.config.resampler.num_time_embeddings
        times = [torch.from_numpy(time_weights(len(features), embeddings))] if embeddings else []
        media = features[None] if self.config.tiled is None else features[:, None]
        latents: Tensor = module(torch.from_numpy(media), *times)
        return latents

    def _embed(self, module: Any, index: int) -> Tensor:
        import torch

        embedded: Tensor = module.embedding(torch.from_numpy(self.checked.samples[index].token_ids))
        return embedded

    def _gated(self, hidden: Stream, latents: Stream) -> Callable[[Any, int], Tensor]:
        import torch

        resampler = self.config.resampler

        def run(module: Any, index: int) -> Tensor:
            sample = self.checked.samples[index]
            empty = np.zeros((0, resampler.num_latents, resampler.width), np.float32)
            shown = [latents.read(self.first_medium[index] + place) for place in range(len(sample.media))]
            k, v = module.media_kv(torch.from_numpy(np.concatenate([empty, *shown])))
            rows, phi = torch.arange(sum(sample.rows))[None], torch.from_numpy(sample.phi[None])
            first = [] if sample.first is None else [torch.from_numpy(sample.first[None])]
            found: Tensor = module(torch.from_numpy(hidden.read(index)[None]), k, v, rows, phi, *first)[0]
            return found

        return run

    def _layer(self, hidden: Stream) -> Callable[[Any, int], Tensor]:
        import torch

        def run(module: Any, index: int) -> Tensor:
            found: Tensor = module(torch.from_numpy(hidden.read(index)[None]))[0]
            return found

        return run

    def _head(self, hidden: Stream) -> Callable[[Any, int], Tensor]:
        import torch

        def run(module: Any, index: int) -> Tensor:
            normed: Tensor = module.norm(torch.from_numpy(hidden.read(index)))
            return normed

        return run
