"""What the reference computes in every case: one pass over the model's parts, in fp64 and in the parts' own type (fp32) side by side.

Sequences run whole and uncached; the engine's chunks, caches, masks and trees of beams must come to the same numbers.
`alone` feeds each LM layer (with the gated block before it) with the reference's hidden states, rounded to fp32; `carried` with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flamingo_export.progress import SILENT, Progress
from flamingo_export.specs import IMAGE_TOWER, TEXT_TOWER
from flamingo_export.validate.checks.tensor_checks import expect
from flamingo_export.validate.expected import inputs
from flamingo_export.validate.expected.cases import (
    END_TO_END_CASE,
    LAYERS_CASE,
    DecoderCase,
    EncoderCase,
    decoder_cases,
    encoder_cases,
    image_aspect,
    image_rows,
)
from flamingo_export.validate.expected.decoder_calls import Plan, plan_case
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.media_rounding import BANK_ROWS, FLOATS, MediaFormat
from flamingo_export.validate.expected.reference_parts import Parts
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import ClassToken, Readout
from flamingo_reference.names import pooled_width
from flamingo_reference.time_weights import time_weights

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[str, int]
"""Case and sequence."""


def encoder_feeds(config: ModelConfig, case: EncoderCase) -> dict[str, Array]:
    """Inputs of a case of vision_encoder, resampler, media_kv or a tower."""
    vision, resampler, contrastive = config.vision, config.resampler, config.contrastive
    key = f"{case.subgraph}/{case.name}"
    if case.subgraph == "vision_encoder" and config.tiled is not None:
        aspects = [image_aspect(config, image) for image in range(case.rows)]
        tiles = inputs.normal(key, (case.rows, config.tiled.max_tiles, 3, vision.image_size, vision.image_size))
        for image, aspect in zip(tiles, aspects, strict=True):
            image[config.tiled.num_tiles(aspect) :] = 0
        return {"pixels": tiles, "aspect_ratio_ids": np.array(aspects, np.int64)}
    if case.subgraph == "vision_encoder":
        return {"pixels": inputs.normal(key, (case.rows, 3, vision.image_size, vision.image_size))}
    if case.subgraph == "resampler":
        shape = (case.rows, case.frames, vision.num_patches, vision.feature_width)
        return resampler_feeds(config, inputs.normal(key, shape))
    if contrastive is not None and case.subgraph == IMAGE_TOWER:
        return {"pooled": inputs.normal(key, (case.rows, pooled_width(config, contrastive)))}
    if contrastive is not None and contrastive.text is not None and case.subgraph == TEXT_TOWER:
        drawn = inputs.integers(key, case.rows * max(case.lengths), 0, contrastive.text.vocab_size)
        ids = np.asarray(drawn, np.int64).reshape(case.rows, -1)
        return {"token_ids": ids, "lengths": np.asarray(case.lengths, np.int64)}
    return {"latents": inputs.normal(key, (case.rows, resampler.num_latents, resampler.width))}


def features_of_media(config: ModelConfig, features: Any) -> Any:
    """Features [N, 1, P, E] of media that are images, of the vision encoder's for the cases' images, arrays or tensors: of images of tiles
    those of the tiles that there are."""
    if config.tiled is None:
        return features[:, None]
    places = [(image, tile) for image in range(len(features)) for tile in range(len(image_rows(config, image)))]
    return features[[image for image, _ in places], [tile for _, tile in places]][:, None]


def resampler_feeds(config: ModelConfig, features: Array) -> dict[str, Array]:
    """Inputs of the resampler for features [N, T, P, E]: time weights only where frames have time embeddings."""
    embeddings = config.resampler.num_time_embeddings
    times = {"time_weights": time_weights(features.shape[1], embeddings)} if embeddings else {}
    return {"features": features, **times}


def fed_positions(plan: Plan) -> dict[int, list[int]]:
    """For each sequence, the positions that the engine is fed as its own, ascending."""
    fed: dict[int, set[int]] = {}
    for call in plan.calls:
        for sequence, position in call.origin.reshape(-1, 2).tolist():
            if sequence >= 0:
                fed.setdefault(sequence, set()).add(position)
    return {sequence: sorted(positions) for sequence, positions in sorted(fed.items())}


def record_numbers(
    parts: Parts,
    goldens: Goldens,
    progress: Progress = SILENT,
    *,
    cases: Sequence[DecoderCase] | None = None,
    media: MediaFormat = FLOATS,
) -> None:
    """Fills `goldens` with what is expected in every case. Needs torch.

    cases: of the decoder, None for `decoder_cases`. media: how the bank holds keys and values.
    """
    _Recorder(parts, goldens, progress, decoder_cases(parts.config) if cases is None else cases, media).run()


class _Recorder:
    def __init__(
        self, parts: Parts, goldens: Goldens, progress: Progress, cases: Sequence[DecoderCase], media: MediaFormat
    ) -> None:
        self.parts, self.goldens, self.progress, self.media = parts, goldens, progress, media
        self.config = parts.config
        self.cases = {case.name: case for case in cases}
        self.plans = {name: plan_case(self.config, case) for name, case in self.cases.items()}
        self.latents: tuple[Any, Any] = (None, None)
        """Of the end-to-end case, in fp64 and the type of the engines."""

    def run(self) -> None:
        self.progress.stage("reference values", self.config.language_model.num_layers + 3)
        self._encoders()
        self._towers()
        self._decoder()

    def _encoders(self) -> None:
        import torch

        config = self.config
        by_subgraph: dict[str, list[EncoderCase]] = {}
        for case in encoder_cases(config):
            by_subgraph.setdefault(case.subgraph, []).append(case)
        features: list[Tensor] = []
        for case in by_subgraph["vision_encoder"]:
            pixels, *aspects = (torch.from_numpy(array) for array in encoder_feeds(config, case).values())
            features = self._vision(f"vision_encoder, {case.name}", pixels, *aspects)
        self.progress.advance(1)
        feeds = [encoder_feeds(config, case) for case in by_subgraph["resampler"]]
        # The end-to-end case: the encoder's own frames, as images.
        embeddings = config.resampler.num_time_embeddings
        one = [torch.from_numpy(time_weights(1, embeddings))] if embeddings else []

        def resample(module: Any, chained: Tensor) -> list[Tensor]:
            found = [module(*(torch.from_numpy(array).to(chained) for array in feed.values())) for feed in feeds]
            return [*found, module(features_of_media(config, chained), *(weights.to(chained) for weights in one))]

        fp64, rounded = self.parts.stage("resampler", lambda m: resample(m, features[0]), lambda m: resample(m, features[1]))
        for case, one_fp64, one_rounded in zip(by_subgraph["resampler"], fp64, rounded, strict=False):
            self._put(f"resampler, {case.name}", "latents", one_fp64, one_rounded)
        self._put(END_TO_END_CASE, "latents", fp64[-1], rounded[-1])
        self.latents = fp64[-1], rounded[-1]
        self.progress.advance(1)

    def _vision(self, name: str, pixels: Tensor, *aspects: Tensor) -> list[Tensor]:
        """features, and `pooled` of a contrastive encoder, in fp64 and the type of the engines."""
        contrastive = self.config.contrastive
        rounded_pixels = pixels.to(self.parts.dtype)
        if contrastive is None:
            fp64, rounded = self.parts.stage(
                "vision_encoder", lambda m: m(pixels.double(), *aspects), lambda m: m(rounded_pixels, *aspects)
            )
        elif isinstance(contrastive.pooling, ClassToken):
            # The token is taken where the module itself puts it, hooks and all.
            def run(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
                tokens = module.tokens(x)
                return module.features_of(tokens), tokens[:, 0]

            (fp64, fp64_pooled), (rounded, rounded_pooled) = self.parts.stage(
                "vision_encoder", lambda m: run(m, pixels.double()), lambda m: run(m, rounded_pixels)
            )
            self._put(name, "pooled", fp64_pooled, rounded_pooled)
        else:
            fp64, rounded = self.parts.stage("vision_encoder", lambda m: m(pixels.double()), lambda m: m(rounded_pixels))
            if isinstance(contrastive.pooling, Readout):
                pooled = self.parts.stage(
                    "contrastive.readout", lambda m: m(fp64[:, None]).flatten(1), lambda m: m(rounded[:, None]).flatten(1)
                )
            else:
                pooled = fp64.mean(1), rounded.mean(1)
            self._put(name, "pooled", *pooled)
        self._put(name, "features", fp64, rounded)
        return [fp64, rounded]

    def _towers(self) -> None:
        """The towers by themselves, on drawn pooled features and tokens."""
        import torch

        for case in encoder_cases(self.config):
            if case.subgraph not in (IMAGE_TOWER, TEXT_TOWER):
                continue
            feeds = [torch.from_numpy(array) for array in encoder_feeds(self.config, case).values()]
            part = "contrastive.image" if case.subgraph == IMAGE_TOWER else "contrastive.text"

            def in_fp64(module: Any, given: list[Tensor] = feeds) -> Tensor:
                found: Tensor = module(*(x.double() if x.is_floating_point() else x for x in given))
                return found

            def as_given(module: Any, given: list[Tensor] = feeds) -> Tensor:
                found: Tensor = module(*(x.to(self.parts.dtype) if x.is_floating_point() else x for x in given))
                return found

            fp64, rounded = self.parts.stage(part, in_fp64, as_given)
            self._put(f"{case.subgraph}, {case.name}", f"{case.subgraph.removesuffix('_tower')}_embedding", fp64, rounded)

    def _decoder(self) -> None:
        import torch

        config = self.config
        fp64, rounded = self.parts.stage("language_model", self._embed, self._embed)
        gated = {layer: i for i, layer in enumerate(config.gated_layers)}
        last = config.language_model.num_layers - 1
        for j in range(config.language_model.num_layers):
            # The first layer of an engine embeds the tokens itself, with the embedding as it is stored.
            alone = {
                key: hidden.to(self.parts.dtype) for key, hidden in (fp64 if j else rounded).items() if key[0] == LAYERS_CASE
            }
            before = alone[LAYERS_CASE, 0].double()
            self.goldens.hidden[str(j)] = alone[LAYERS_CASE, 0][0].float().numpy().copy()
            if j in gated:
                fp64, (rounded, alone) = self._gated(gated[j], fp64, rounded, alone)

            def layer(module: Any, *streams: dict[Key, Tensor]) -> tuple[list[dict[Key, Tensor]], list[Tensor]]:
                _, k, v = module.qkv(streams[-1][LAYERS_CASE, 0])
                return [{key: module(hidden) for key, hidden in stream.items()} for stream in streams], [k[0], v[0]]

            (fp64s, fp64_kv), (roundeds, rounded_kv) = self.parts.stage(
                f"language_model.layers.{j}",
                lambda m, w=fp64: layer(m, w),  # type: ignore[misc]
                lambda m, n=rounded, a=alone: layer(m, n, a),  # type: ignore[misc]
            )
            (fp64,), (rounded, alone) = fp64s, roundeds
            right, stored = fp64[LAYERS_CASE, 0], alone[LAYERS_CASE, 0].double()
            self.goldens.policy_costs[str(j)] = _rms(stored - right) / (_rms(right - before) or 1.0)
            for kind, one_fp64, one_rounded in zip("kv", fp64_kv, rounded_kv, strict=True):
                self._put(LAYERS_CASE, f"layer.{j}.{kind}", one_fp64, one_rounded)
            if j < last:
                key = (LAYERS_CASE, 0)
                self._put(LAYERS_CASE, f"layer.{j}.output", fp64[key][0], alone[key][0])
                self._put(LAYERS_CASE, f"layer.{j}.carried", fp64[key][0], rounded[key][0])
            self.progress.advance(1)

        def logits(module: Any, *streams: dict[Key, Tensor]) -> list[dict[Key, Tensor]]:
            return [{key: module.logits(hidden)[0] for key, hidden in stream.items()} for stream in streams]

        fp64s, roundeds = self.parts.stage("language_model", lambda m: logits(m, fp64), lambda m: logits(m, rounded, alone))
        (fp64,), (rounded, alone) = fp64s, roundeds
        key = (LAYERS_CASE, 0)
        self._put(LAYERS_CASE, f"layer.{last}.output", fp64[key], alone[key])
        self._put(LAYERS_CASE, f"layer.{last}.carried", fp64[key], rounded[key])
        for name, plan in self.plans.items():
            fed = fed_positions(plan)
            joined = [torch.cat([stream[name, sequence][at] for sequence, at in fed.items()]) for stream in (fp64, rounded)]
            self._put(name, "logits", *joined)
        self._pool()
        self.progress.advance(1)

    def _embed(self, module: Any) -> dict[Key, Tensor]:
        import torch

        return {
            (name, index): module.embedding(torch.tensor([sequence.tokens]))
            for name, plan in self.plans.items()
            for index, sequence in enumerate(plan.sequences)
        }

    def _gated(
        self, i: int, fp64: dict[Key, Tensor], rounded: dict[Key, Tensor], alone: dict[Key, Tensor]
    ) -> tuple[dict[Key, Tensor], list[dict[Key, Tensor]]]:
        """One gated block: the media_kv case, and every sequence of every case."""
        import torch

        (kv_case,) = (case for case in encoder_cases(self.config) if case.subgraph == "media_kv")
        case_latents = torch.from_numpy(encoder_feeds(self.config, kv_case)["latents"])
        drawn = self.media.drawn(self.config, i, BANK_ROWS)
        held = [self.media.rounded(f"media_{kind}.{i}", values) for kind, values in zip("kv", drawn, strict=True)]

        def run(
            module: Any, bank: Sequence[Array], latents: Tensor, *streams: dict[Key, Tensor]
        ) -> tuple[list[dict[Key, Tensor]], Any, Any]:
            given = [torch.from_numpy(array).to(latents) for array in bank]
            encoded = module.media_kv(latents)
            found = []
            for stream in streams:
                found.append(
                    {
                        key: module(hidden, *(encoded if self.cases[key[0]].from_pixels else given), *self._phi(key))
                        for key, hidden in stream.items()
                    }
                )
            return found, module.media_kv(case_latents.to(latents)), encoded

        (fp64s, fp64_kv, _), (roundeds, rounded_kv, _) = self.parts.stage(
            f"cross_attention.{i}",
            lambda m: run(m, drawn, self.latents[0], fp64),
            lambda m: run(m, held, self.latents[1], rounded, alone),
        )
        for kind, one_fp64, one_rounded in zip("kv", fp64_kv, rounded_kv, strict=True):
            self._put(f"media_kv, {kv_case.name}", f"media_{kind}.{i}", one_fp64, one_rounded)
        return fp64s[0], roundeds

    def _phi(self, key: Key) -> list[Tensor]:
        """media_rows, phi and, where positions see ranges of media, first_media of a sequence."""
        import torch

        sequence = self.plans[key[0]].sequences[key[1]]
        first, phi = sequence.seen(self.config)
        rows = np.asarray(sequence.rows(self.config) or (0,), np.int64)
        found = [rows, phi, first] if self.config.sees_groups else [rows, phi]
        return [torch.from_numpy(array)[None] for array in found]

    def _pool(self) -> None:
        """PyTorch's error in the logits of drawn media: the largest of all cases, for each of them.

        It is the same computation in all; a case of few numbers, such as a single token, does not find the largest error by itself.
        """
        names = [name for name, case in self.cases.items() if not case.from_pixels]
        found = {name: self.goldens.expected[f"{name}|logits"] for name in names}
        largest = float(np.max([value.torch_error for value in found.values()]))  # NaN stays NaN
        for name, value in found.items():
            self.goldens.put(name, "logits", msgspec.structs.replace(value, torch_error=largest))

    def _put(self, case: str, tensor: str, fp64: Tensor, rounded: Tensor) -> None:
        self.goldens.put(case, tensor, expect(fp64.numpy(), rounded.float().numpy()))


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
