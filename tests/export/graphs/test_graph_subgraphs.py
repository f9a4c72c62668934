"""Vision encoder, resampler and media K/V on ONNX Runtime against the reference: error against fp64 at most twice PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from flamingo_export.precision import Precision
from flamingo_export.sources import LiveSource
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.model.subgraphs import Subgraph, subgraphs_of
from flamingo_reference.time_weights import time_weights
from tests.export.graphs.conftest import Calls, Run, assert_as_exact, open_graph, reference


@pytest.fixture
def compare(
    graph: Callable[[str], Run], subgraphs: dict[str, Subgraph], exact_subgraphs: dict[str, Subgraph]
) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    def check(name: str, feeds: dict[str, Any]) -> dict[str, Any]:
        actual = graph(name)(feeds)
        exact = reference(exact_subgraphs[name], feeds, torch.float64)
        eager = reference(subgraphs[name], feeds, torch.float32)
        assert set(actual) == set(exact)
        for output, values in actual.items():
            assert_as_exact(name, exact[output], eager[output], values)
        return actual

    return check


def test_vision_encoder(compare: Callable[..., Any], calls: Calls) -> None:
    side = calls.config.vision.image_size
    compare("vision_encoder", {"pixels": calls.normal(3, 3, side, side)})


@pytest.mark.parametrize("side", [20, 37])
def test_vision_encoder_of_odd_grids(
    tiny_config: ModelConfig, bundle_writer: Callable[..., Path], tmp_path: Path, side: int
) -> None:
    """SAME padding puts the odd row below, and pooling rounds up."""
    config = msgspec.structs.replace(tiny_config, vision=msgspec.structs.replace(tiny_config.vision, image_size=side))
    torch.manual_seed(side)
    model = Flamingo(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("skip_gain"):
                parameter.fill_(0.7)
    encoder = open_graph(bundle_writer(LiveSource(model), tmp_path / "b") / "vision_encoder.onnx")
    feeds = {"pixels": Calls(config).normal(1, 3, side, side)}
    eager = reference(subgraphs_of(model)["vision_encoder"], feeds, torch.float32)["features"]
    exact = reference(subgraphs_of(model.double())["vision_encoder"], feeds, torch.float64)["features"]
    assert_as_exact("vision_encoder", exact, eager, encoder(feeds)["features"])


@pytest.mark.parametrize("frames", [1, 3, 8, 11])
def test_resampler(compare: Callable[..., Any], calls: Calls, frames: int) -> None:
    vision = calls.config.vision
    features = calls.normal(2, frames, vision.num_patches, vision.feature_width)
    weights = time_weights(frames, calls.config.resampler.num_time_embeddings)
    latents = compare("resampler", {"features": features, "time_weights": weights})["latents"]
    assert np.abs(latents[0] - latents[1]).max() > 0.1


def test_frames_are_told_apart_by_their_time(graph: Callable[[str], Run], calls: Calls) -> None:
    vision = calls.config.vision
    features = calls.normal(1, 2, vision.num_patches, vision.feature_width)
    weights = time_weights(2, calls.config.resampler.num_time_embeddings)
    forward, backward = (
        graph("resampler")({"features": frames, "time_weights": weights})["latents"] for frames in (features, features[:, ::-1])
    )
    assert np.abs(forward - backward).max() > 1e-2


def test_media_kv(compare: Callable[..., Any], calls: Calls) -> None:
    resampler = calls.config.resampler
    compare("media_kv", {"latents": calls.normal(3, resampler.num_latents, resampler.width)})


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_16_bit_storage(tiny_model: Flamingo, bundle_writer: Callable[..., Path], tmp_path: Path, storage: Any) -> None:
    """As near to the model as PyTorch is with weights rounded to that type, computed in fp32."""
    bundle = bundle_writer(LiveSource(tiny_model), tmp_path / "b", precision=Precision(storage=storage))
    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    rounded = Flamingo(tiny_model.config)
    rounded.load_state_dict({name: tensor.to(narrow).float() for name, tensor in tiny_model.state_dict().items()})
    exact_model = Flamingo(tiny_model.config).double()
    exact_model.load_state_dict({name: tensor.double() for name, tensor in tiny_model.state_dict().items()})
    eager, exact = subgraphs_of(rounded.eval()), subgraphs_of(exact_model.eval())
    calls = Calls(tiny_model.config)
    vision, resampler = calls.config.vision, calls.config.resampler
    feeds = {
        "vision_encoder": {"pixels": calls.normal(2, 3, vision.image_size, vision.image_size)},
        "resampler": {
            "features": calls.normal(1, 2, vision.num_patches, vision.feature_width),
            "time_weights": time_weights(2, resampler.num_time_embeddings),
        },
        "media_kv": {"latents": calls.normal(1, resampler.num_latents, resampler.width)},
        "decoder": {
            **calls.prompt(1, 9, 16),
            "phi": np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1]]),
            **calls.bank,
            **calls.cache(1, 16),
        },
    }
    for name, inputs in feeds.items():
        actual = open_graph(bundle / f"{name}.onnx")(inputs)
        own = reference(eager[name], inputs, torch.float32)
        for output, values in reference(exact[name], inputs, torch.float64).items():
            assert_as_exact(name, values, own[output], actual[output], storage)
