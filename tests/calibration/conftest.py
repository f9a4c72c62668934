"""Small models of every kind with samples that fit them, and what the whole fp64 model computes of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from recorder import Recorder
from variations import GROUPED, VARIATIONS, drawn_model

from flamingo_calibration import Sample, shipped_samples
from flamingo_export.runtime.media import load_medium
from flamingo_export.sources import LiveSource
from flamingo_export.weights.calibration_table import CalibrationTable
from flamingo_reference.config import ModelConfig, RelativePositions
from flamingo_reference.model import Flamingo
from flamingo_reference.phi import media_ranges, phi_from_tokens

Array = npt.NDArray[np.float64]

RELATIVE = msgspec.structs.replace(
    GROUPED,
    name="relative",
    language_model=msgspec.structs.replace(GROUPED.language_model, positions=RelativePositions(), num_kv_heads=None),
)
CONFIGS = {config.name: config for config in (RELATIVE, *VARIATIONS.values())}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked children must not wait for threads that only their parent has; these models are too small for more anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def relative() -> ModelConfig:
    """The smallest of them."""
    return RELATIVE


@pytest.fixture(scope="session")
def calibrated() -> Callable[[ModelConfig], CalibrationTable]:
    """The table of a config's drawn model on the shipped samples, made once."""
    from flamingo_calibration import calibrate

    @cache
    def table(name: str) -> CalibrationTable:
        return calibrate(LiveSource(drawn_model(CONFIGS[name])), shipped_samples(CONFIGS[name], None), tokenizer=None)

    return lambda config: table(config.name)


@pytest.fixture(scope="session")
def seen_whole() -> Callable[[ModelConfig], dict[str, Array]]:
    """`watch_whole` on the shipped samples, once a config."""

    @cache
    def seen(name: str) -> dict[str, Array]:
        model = drawn_model(CONFIGS[name], dtype=torch.float64)
        return watch_whole(model, shipped_samples(CONFIGS[name], None))

    return lambda config: seen(config.name)


def watch_whole(model: Flamingo, samples: list[Sample]) -> dict[str, Array]:
    """Every operand of the whole model's products on all samples, by the table's names; inputs of products as [rows, channels].

    Which module's input a name means is written out here, not derived from the bundle's weights.
    """
    found: dict[str, list[Array]] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        found.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]).numpy().copy())

    def listen(name: str, module: Any) -> Any:
        return module.register_forward_pre_hook(lambda _, arguments: keep(name, arguments[0]))

    handles = [listen(name, module) for name, module in named_modules(model)]
    for sample in samples:
        run_whole(model, sample, keep)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(pieces) for name, pieces in found.items()}


def named_modules(model: Flamingo) -> Iterator[tuple[str, Any]]:
    """The table's name of each product's input, and a module that has this input."""
    config = model.config
    towers = (("layer", "layers"), ("global_layer", "global_layers"))
    named = [
        (f"vision_encoder/{name}.{i}", layer)
        for name, stack in towers
        for i, layer in enumerate(getattr(model.vision_encoder, stack, ()))
    ]
    for name, layer in named:
        yield from ((f"{name}/qkv_proj", layer.k_proj), (f"{name}/out_proj", layer.out_proj))
        yield from ((f"{name}/ffw_up", layer.ffw_up), (f"{name}/ffw_down", layer.ffw_down))
    if model.resampler.input_proj is not None:
        yield "resampler/input_proj", model.resampler.input_proj
    for i, layer in enumerate(getattr(model.resampler, "layers", ())):
        name = f"resampler/layer.{i}"
        yield from ((f"{name}/q_proj", layer.q_proj), (f"{name}/kv_proj", layer.v_proj), (f"{name}/out_proj", layer.out_proj))
        yield from ((f"{name}/ffw_up", layer.ffw_up), (f"{name}/ffw_down", layer.ffw_down))
    for i, j in enumerate(config.gated_layers):
        block, name = model.gated_blocks()[i], f"decoder/layer.{j}/cross_attention"
        yield from ((f"media_kv/layer.{i}/k_proj", block.k_proj), (f"media_kv/layer.{i}/v_proj", block.v_proj))
        yield from ((f"{name}/q_proj", block.q_proj), (f"{name}/out_proj", block.out_proj))
        yield from ((f"{name}/ffw_up", block.ffw_up), (f"{name}/ffw_down", block.ffw_down))
    for j, layer in enumerate(model.language_model.layers):
        name = f"decoder/layer.{j}"
        yield f"{name}/self_attention/qkv_proj", layer.v_proj
        yield f"{name}/self_attention/out_proj", layer.out_proj
        yield from ((f"{name}/ffw_up", layer.ffw_up), (f"{name}/ffw_down", layer.ffw_down))


def run_whole(model: Flamingo, sample: Sample, keep: Callable[[str, torch.Tensor], None]) -> torch.Tensor:
    """Logits of a sample by the whole model; operands of attention and the head's input go to `keep`."""
    config, ids = model.config, np.asarray([sample.prompt])
    with torch.no_grad():
        media_shown = [load_medium(source, config) for source in sample.media]
        shape = (0, config.resampler.num_latents, config.resampler.width)
        latents = []
        for one in media_shown:
            pixels = torch.from_numpy(one.pixels).to(next(model.parameters()))
            latents.append(model.latents(pixels, torch.tensor([one.aspect])) if one.aspect else model.latents(pixels[None]))
        joined = torch.cat([torch.zeros(shape).to(next(model.parameters())), *latents])
        media = model.media_kv(joined)
        if latents:
            for i, (k, v) in enumerate(media):
                keep(f"media_kv/layer.{i}/k", k)
                keep(f"media_kv/layer.{i}/v", v)
        hidden = model.language_model.embedding(torch.from_numpy(ids))
        seen = [phi_from_tokens(ids, config.tokens.image, config.tokens.reset)]
        if config.sees_groups:
            seen = list(media_ranges(ids, config.tokens.image, np.array([[one.rows for one in media_shown]], np.int64)))[::-1]
        bounds = [torch.from_numpy(bound) for bound in seen]
        rows = torch.arange(len(joined))[None]
        layer: Any
        for j, layer in enumerate(model.language_model.layers):
            if j in config.gated_layers:
                i = config.gated_layers.index(j)
                hidden = model.gated_blocks()[i](hidden, *media[i], rows, *bounds)
            q, k, v = layer.qkv(hidden)
            if isinstance(config.language_model.positions, RelativePositions):
                q = q + layer.content_bias[None, :, None]
            for kind, operand in zip("qkv", (q, k, v), strict=True):
                keep(f"decoder/layer.{j}/self_attention/{kind}", operand)
            hidden = layer(hidden)
        keep("decoder/head", model.language_model.norm(hidden))
        return model.language_model.logits(hidden)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
