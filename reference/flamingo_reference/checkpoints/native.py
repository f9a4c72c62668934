"""Our own checkpoint format: `config.json`, `*.safetensors` (one file, or shards with an index), `tokenizer/tokenizer.json`.

Tensor names are the parameter names of `flamingo_reference.model.Flamingo`; linear weights are [out, in] as PyTorch has them.
"""

from __future__ import annotations

from collections.abc import Iterator

from flamingo_reference.config import ModelConfig

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in the order the model uses them."""
    tensors: dict[str, Shape] = {}
    for name, shape in _vision_encoder(config):
        tensors[f"vision_encoder.{name}"] = shape
    for name, shape in _resampler(config):
        tensors[f"resampler.{name}"] = shape
    for index in range(len(config.gated_layers)):
        for name, shape in _cross_attention(config):
            tensors[f"cross_attention.{index}.{name}"] = shape
    for name, shape in _language_model(config):
        tensors[f"language_model.{name}"] = shape
    return tensors


def component_of(name: str) -> str:
    """The component a tensor belongs to: vision_encoder, resampler, cross_attention or language_model."""
    return name.split(".", 1)[0]


def squeeze_width(width: int, ratio: float) -> int:
    """Width inside a squeeze-excite block: a multiple of 8, never below 90 % of width * ratio (timm's `make_divisible`)."""
    wanted = width * ratio
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _conv(name: str, out: int, into: int, kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)
    yield f"{name}.gain", (out, 1, 1, 1)


def _vision_encoder(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision = config.vision
    width = 3
    for index, stem_width in enumerate(vision.stem_widths):
        yield from _conv(f"stem.{index}", stem_width, width, 3)
        width = stem_width
    for stage, (out, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
        middle = int(out * vision.bottleneck_ratio)
        squeezed = squeeze_width(out, vision.squeeze_excite_ratio)
        for block in range(depth):
            prefix = f"stages.{stage}.{block}"
            if block == 0:
                yield from _conv(f"{prefix}.downsample", out, width, 1)
            yield from _conv(f"{prefix}.conv1", middle, width, 1)
            yield from _conv(f"{prefix}.conv2", middle, vision.group_width, 3)
            yield from _conv(f"{prefix}.conv2b", middle, vision.group_width, 3)
            yield from _conv(f"{prefix}.conv3", out, middle, 1)
            yield f"{prefix}.squeeze_excite.fc1.weight", (squeezed, out, 1, 1)
            yield f"{prefix}.squeeze_excite.fc1.bias", (squeezed,)
            yield f"{prefix}.squeeze_excite.fc2.weight", (out, squeezed, 1, 1)
            yield f"{prefix}.squeeze_excite.fc2.bias", (out,)
            yield f"{prefix}.skip_gain", ()
            width = out
    yield from _conv("final_conv", vision.feature_width, width, 1)


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resampler(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    resampler = config.resampler
    width, inner = resampler.width, resampler.num_heads * resampler.head_size
    yield "input_proj.weight", (width, config.vision.feature_width)
    yield "latents", (resampler.num_latents, width)
    yield "time_embeddings", (resampler.num_time_embeddings, width)
    for layer in range(resampler.num_layers):
        prefix = f"layers.{layer}"
        yield from _layer_norm(f"{prefix}.media_norm", width)
        yield from _layer_norm(f"{prefix}.latent_norm", width)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}.{name}.weight", (inner, width)
        yield f"{prefix}.out_proj.weight", (width, inner)
        yield from _layer_norm(f"{prefix}.ffw_norm", width)
        yield f"{prefix}.ffw_up.weight", (resampler.ffw_width, width)
        yield f"{prefix}.ffw_down.weight", (width, resampler.ffw_width)
    yield from _layer_norm("norm", width)


def _cross_attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    block = config.cross_attention
    width, media_width, inner = config.language_model.width, config.resampler.width, block.num_heads * block.head_size
    yield from _layer_norm("norm", width)
    yield "q_proj.weight", (inner, width)
    yield "k_proj.weight", (inner, media_width)
    yield "v_proj.weight", (inner, media_width)
    yield "out_proj.weight", (width, inner)
    yield "attention_gate", ()
    yield from _layer_norm("ffw_norm", width)
    yield "ffw_up.weight", (block.ffw_width, width)
    yield "ffw_down.weight", (width, block.ffw_width)
    yield "ffw_gate", ()


def _language_model(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    lm = config.language_model
    inner = lm.num_heads * lm.head_size
    yield "embedding.weight", (lm.vocab_size, lm.width)
    for layer in range(lm.num_layers):
        prefix = f"layers.{layer}"
        yield f"{prefix}.attention_norm.weight", (lm.width,)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}.{name}.weight", (inner, lm.width)
        yield f"{prefix}.relative_proj.weight", (inner, lm.width)
        yield f"{prefix}.content_bias", (lm.num_heads, lm.head_size)
        yield f"{prefix}.position_bias", (lm.num_heads, lm.head_size)
        yield f"{prefix}.out_proj.weight", (lm.width, inner)
        yield f"{prefix}.ffw_norm.weight", (lm.width,)
        yield f"{prefix}.ffw_up.weight", (lm.ffw_width, lm.width)
        yield f"{prefix}.ffw_down.weight", (lm.width, lm.ffw_width)
    yield "norm.weight", (lm.width,)
