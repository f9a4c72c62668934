"""Whether a calibration table can be of these weights at all: bounds that the weights set to the activations, whatever the data.

Parity finds a wrong range by what it costs. Where parity is not run these bounds are all that stands between a wrong table and a bundle:

    after a norm           x = gain * z + bias with mean(z^2) = 1 in each position, so |x| <= gain * sqrt(W) + bias, and the root mean squares of
                           the channels, which the table has up to a common factor, fix that factor: the largest number is at least the
                           largest of them
    after a product        |w . x| <= |w| * |x|, and activations grow no number (squared ReLU squares it, SwiGLU multiplies two)
    after attention        a weighted mean of values is no larger than the largest value

A table of the right weights and any data keeps them; they do not find every wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flamingo_export.errors import CalibrationError
from flamingo_export.precision import Precision
from flamingo_export.quantize.matrices import dequantised
from flamingo_export.weights.calibration_table import CALIBRATE_AGAIN, CalibrationTable, has_towers
from flamingo_export.weights.components import bundle_weights
from flamingo_export.weights.layout import SCALE, WeightIndex
from flamingo_reference.arrays import Floats
from flamingo_reference.config import FeedForward, ModelConfig, RelativePositions, TiledViTConfig, ViTConfig
from flamingo_reference.contrastive_config import ContrastiveConfig, Readout, TextConfig
from flamingo_reference.names import readout_model

_ABOVE = 1.2
"""What a largest number may be above its bound: matrices are read as stored, rounded to as few as 4 bits."""
_BELOW = 0.7
"""What it may be below its bound: where hidden states are about as small as a norm's epsilon, mean(z^2) is less than 1."""
_SHOWN = 8


def check_ranges(bundle: Path, config: ModelConfig, precision: Precision, table: CalibrationTable) -> None:
    """Raises CalibrationError naming the ranges that no data can have given with the weights in `bundle`, as they are stored there."""
    faults = list(_Bounds(bundle, config, precision, table).faults())
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CalibrationError(
            f"the calibration table of {table.model} cannot be of these weights: {'; '.join(faults[:_SHOWN])}{more}. {CALIBRATE_AGAIN}"
        )


class _Bounds:
    def __init__(self, bundle: Path, config: ModelConfig, precision: Precision, table: CalibrationTable) -> None:
        self._bundle, self._config, self._table = bundle, config, table
        self._index = WeightIndex.read(bundle)
        self._quantised = {weight.name: weight.quantisation(precision) for weight in bundle_weights(config, precision)}

    def faults(self) -> Iterator[str]:
        config, lm = self._config, self._config.language_model
        yield from self._vision()
        yield from self._perceiver("resampler", config)
        if config.contrastive is not None and has_towers(self._table):
            yield from self._towers(config.contrastive)
        for layer in range(lm.num_layers):
            name = f"decoder/layer.{layer}"
            if layer in config.gated_layers:
                media, block = f"media_kv/layer.{config.gated_layers.index(layer)}", f"{name}/cross_attention"
                yield from self._media(media)
                yield from self._normed(f"{block}/q_proj", f"{block}/norm", self._table.tokens)
                yield from self._at_most(
                    f"{block}/out_proj", self._amax(f"{media}/v"), "which is the largest of the media's values"
                )
                yield from self._up_and_down(
                    block, f"{block}/ffw_norm", config.cross_attention.feed_forward, self._table.tokens
                )
            attention, norm = f"{name}/self_attention", f"{name}/attention_norm"
            yield from self._normed(f"{attention}/qkv_proj", norm, self._table.tokens)
            yield from self._operands(attention, norm)
            yield from self._at_most(
                f"{attention}/out_proj", self._amax(f"{attention}/v"), "which is the largest of the values"
            )
            yield from self._up_and_down(name, f"{name}/ffw_norm", lm.feed_forward, self._table.tokens)
        yield from self._normed("decoder/head", "decoder/norm", self._table.tokens)

    def _vision(self) -> Iterator[str]:
        """A vision transformer's layers; a convolution's inputs follow no norm of this kind."""
        vision = self._config.vision
        names: list[str] = []
        if isinstance(vision, ViTConfig | TiledViTConfig):
            names = [f"vision_encoder/layer.{layer}" for layer in range(vision.num_layers)]
        if isinstance(vision, TiledViTConfig):
            names += [f"vision_encoder/global_layer.{layer}" for layer in range(vision.num_global_layers)]
        for name in names:
            norm = f"{name}/attention_norm"
            yield from self._normed(f"{name}/qkv_proj", norm)
            yield from self._at_most(f"{name}/out_proj", self._after(f"{name}/qkv_proj", norm))
            yield from self._up_and_down(name, f"{name}/ffw_norm", "gelu")  # no activation of theirs grows a number

    def _perceiver(self, weights: str, config: ModelConfig) -> Iterator[str]:
        for layer in range(config.resampler.num_layers):
            name = f"{weights}/layer.{layer}"
            yield from self._normed(f"{name}/q_proj", f"{name}/latent_norm")
            yield from self._up_and_down(name, f"{name}/ffw_norm", config.resampler.activation)

    def _towers(self, contrastive: ContrastiveConfig) -> Iterator[str]:
        if isinstance(contrastive.pooling, Readout):
            yield from self._perceiver("vision_encoder/readout", readout_model(self._config, contrastive.pooling))
        if contrastive.image_norm:
            yield from self._normed("image_tower/proj", "image_tower/norm")
        if contrastive.text is not None:
            yield from self._text(contrastive.text)

    def _text(self, text: TextConfig) -> Iterator[str]:
        """The norm that a product's input comes from: of its own half of the layer, or where norms come after, of the half before it."""
        before = "text_tower/embedding_norm" if text.embedding_norm else ""
        for layer in range(text.num_layers):
            name = f"text_tower/layer.{layer}"
            attention, ffw = f"{name}/attention_norm", f"{name}/ffw_norm"
            read = before if text.post_norm else attention
            if read:
                yield from self._normed(f"{name}/qkv_proj", read)
                yield from self._at_most(f"{name}/out_proj", self._after(f"{name}/qkv_proj", read))
            yield from self._up_and_down(
                name, attention if text.post_norm else ffw, "gelu"
            )  # no activation of theirs grows a number
            before = ffw
        last = "text_tower/final_norm" if text.final_norm else before if text.post_norm else ""
        if last and text.pooling == "mean":  # a mean is no larger than the largest
            yield from self._at_most("text_tower/proj", self._largest(last), "which a norm gives")
        elif last:
            yield from self._normed("text_tower/proj", last)

    def _media(self, media: str) -> Iterator[str]:
        """What a gated layer makes of latents. A perceiver's left its norm; a projector's went through none."""
        perceiver = self._config.resampler.kind == "perceiver"
        if perceiver:
            for kind in "kv":
                yield from self._normed(f"{media}/{kind}_proj", "resampler/norm")
            yield from self._at_most(f"{media}/v", self._after(f"{media}/v_proj", "resampler/norm"))
        if self._config.cross_attention.qk_norm:
            gain, _ = self._norm(f"{media}/k_norm")
            yield from self._at_most(f"{media}/k", float(gain.max()) * math.sqrt(len(gain)), "by its norm")
        elif perceiver:
            yield from self._at_most(f"{media}/k", self._after(f"{media}/k_proj", "resampler/norm"))

    def _normed(self, name: str, norm: str, positions: int | None = None) -> Iterator[str]:
        """The input of a product that follows a norm. positions: how many the table counted, None where that is not known."""
        gain, bias = self._norm(norm)
        yield from self._at_most(name, self._largest(norm))
        channels = self._table.tensors[name].channels().astype(np.float64)
        if not self._amax(name):
            if np.any(gain) and not np.any(bias):
                yield f"{name} has only zeros, and follows a norm that gives others"
            return
        largest, seen = float(channels.max()), gain > 0
        if not largest or not seen.all():
            return
        low = _unit(lambda unit: float(np.mean(np.square((unit * channels + bias) / gain))))
        if self._amax(name) < _BELOW * low * largest:
            yield f"{name} has a largest number of {self._amax(name):.3g}, expected at least {low * largest:.3g} by its norm and channels"
        if positions is not None:
            high = _unit(lambda unit: float(np.mean(np.square(np.maximum(unit * channels - bias, 0) / gain))))
            yield from self._at_most(name, high * largest * math.sqrt(positions))

    def _operands(self, attention: str, norm: str) -> Iterator[str]:
        lm = self._config.language_model
        bound = self._after(f"{attention}/qkv_proj", norm)
        if not lm.qk_norm:
            turned = math.sqrt(2) * bound  # rotation mixes two numbers of a head
            added = 0.0
            if isinstance(lm.positions, RelativePositions):
                added = float(np.abs(self._read(f"{attention}/content_bias")).max())
            yield from self._at_most(f"{attention}/q", turned + added)
            yield from self._at_most(f"{attention}/k", turned)
        yield from self._at_most(f"{attention}/v", bound)

    def _up_and_down(self, name: str, norm: str, kind: FeedForward, positions: int | None = None) -> Iterator[str]:
        yield from self._normed(f"{name}/ffw_up", norm, positions)
        bound = self._after(f"{name}/ffw_up", norm)
        yield from self._at_most(f"{name}/ffw_down", bound**2 if kind in ("squared_relu", "swiglu") else bound)

    def _at_most(self, name: str, bound: float, why: str = "by the norms of what makes it") -> Iterator[str]:
        if self._amax(name) > _ABOVE * bound:
            yield f"{name} has a largest number of {self._amax(name):.3g}, expected at most {bound:.3g}, {why}"

    def _after(self, name: str, norm: str) -> float:
        """Largest magnitude that a product can have whose input follows a norm."""
        gain, bias = self._norm(norm)
        length = float(gain.max()) * math.sqrt(len(gain)) + float(np.linalg.norm(bias))
        added = self._read(f"{name}/bias") if f"{name}/bias" in self._index else np.zeros(1)
        return float(np.linalg.norm(self._read(name), axis=0).max()) * length + float(np.abs(added).max())

    def _largest(self, norm: str) -> float:
        """Largest magnitude that a norm can give."""
        gain, bias = self._norm(norm)
        return float(np.max(gain * math.sqrt(len(gain)) + bias))

    def _norm(self, name: str) -> tuple[Floats, Floats]:
        """Magnitudes of a norm's gain and bias."""
        gain = np.abs(self._read(f"{name}/weight"))
        return gain, np.abs(self._read(f"{name}/bias")) if f"{name}/bias" in self._index else np.zeros_like(gain)

    def _amax(self, name: str) -> float:
        return self._table.tensors[name].amax

    def _read(self, name: str) -> Floats:
        stored, how = self._index.read_tensor(self._bundle, name), self._quantised.get(name)
        if how is None:
            return stored.astype(np.float32).astype(np.float64)
        return dequantised(stored, self._index.read_tensor(self._bundle, name + SCALE), how).astype(np.float64)


def _unit(mean_square: Callable[[float], float]) -> float:
    """The rms of the whole tensor at which what left the norm has mean square 1, which grows with it; 0 where it is more anyway."""
    if mean_square(0.0) >= 1.0:
        return 0.0
    low, high = 0.0, 1.0
    while mean_square(high) < 1.0 and high < 1e30:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_square(middle) < 1.0 else (low, middle)
    return high
