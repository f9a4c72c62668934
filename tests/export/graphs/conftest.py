"""Opened graphs of the tiny model, its reference in fp64, and inputs for the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from flamingo_export.precision import Precision
from flamingo_export.validate.tolerances import tolerance
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.model.subgraphs import Decoder, Subgraph, decoder_of, subgraphs_of

Arrays = dict[str, Any]
Run = Callable[[Mapping[str, Any]], Arrays]


def open_graph(path: Path | bytes) -> Run:
    """A function from named inputs to named outputs, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def reference(subgraph: Subgraph, feeds: Mapping[str, Any], dtype: torch.dtype) -> Arrays:
    """What a subgraph of the reference says in `dtype`."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    with torch.no_grad():
        return {name: value.numpy() for name, value in subgraph(tensors).items()}


def assert_as_exact(kind: str, exact: Any, eager: Any, actual: Any, storage: Any = "fp32") -> None:
    """Error against fp64 at most what the table of tolerances allows: twice PyTorch's in the same dtype."""
    assert actual.shape == exact.shape
    rms = float(np.sqrt(np.mean(np.square(exact)))) or 1.0
    own = float(np.abs(eager - exact).max()) / rms
    error = float(np.abs(actual - exact).max()) / rms
    limit = tolerance(kind, Precision(storage=storage)).limit(torch_error=own, peak=float(np.abs(exact).max()) / rms)
    assert error <= limit, (error, own)


@pytest.fixture(scope="session")
def graph(tiny_bundle: Path) -> Callable[[str], Run]:
    """Opens a graph of the tiny bundle, once."""
    opened: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in opened:
            opened[name] = open_graph(tiny_bundle / f"{name}.onnx")
        return opened[name]

    return get


@pytest.fixture(scope="session")
def exact_model(tiny_model: Flamingo) -> Flamingo:
    """The tiny model in fp64."""
    return copy.deepcopy(tiny_model).double()


@pytest.fixture(scope="session")
def subgraphs(tiny_model: Flamingo) -> dict[str, Subgraph]:
    """The reference's subgraphs in fp32."""
    return subgraphs_of(tiny_model)


@pytest.fixture(scope="session")
def exact_subgraphs(exact_model: Flamingo) -> dict[str, Subgraph]:
    """The reference's subgraphs in fp64."""
    return subgraphs_of(exact_model)


@pytest.fixture(scope="session")
def exact_decoder(exact_model: Flamingo) -> Decoder:
    """The whole decoder in fp64."""
    return decoder_of(exact_model)


class Calls:
    """Feeds for the decoder of a config: a bank of media, empty caches, prompts."""

    def __init__(self, config: ModelConfig, *, rows: int = 5, seed: int = 0) -> None:
        self.config = config
        self.random = np.random.default_rng(seed)
        block = config.cross_attention
        shape = (rows, block.num_heads, config.resampler.num_latents, block.head_size)
        self.bank = {f"media_{kind}.{i}": self.normal(*shape) for i in range(len(config.gated_layers)) for kind in "kv"}

    def normal(self, *shape: int) -> Any:
        return self.random.standard_normal(shape, dtype=np.float32)

    def cache(self, batch: int, capacity: int) -> Arrays:
        lm = self.config.language_model
        shape = (batch, lm.num_heads, capacity, lm.head_size)
        return {f"past_{kind}.{j}": np.zeros(shape, np.float32) for j in range(lm.num_layers) for kind in "kv"}

    def tokens(self, *shape: int) -> Any:
        return self.random.integers(4, self.config.language_model.vocab_size, shape)

    def prompt(self, batch: int, length: int, capacity: int, *, start: int = 0) -> Arrays:
        """Causal positions start .. start + length - 1 written to the slots of the same numbers; no medium seen."""
        slots = np.arange(capacity)
        places = np.tile(np.arange(start, start + length), (batch, 1))
        return {
            "token_ids": self.tokens(batch, length),
            "positions": places,
            "media_rows": np.zeros((batch, 1), np.int64),
            "phi": np.zeros((batch, length), np.int64),
            "write_index": np.full(batch, start),
            "mask": slots <= places[:, None, :, None],
            "key_positions": np.tile(slots, (batch, 1)),
            "logit_positions": np.tile(np.arange(length), (batch, 1)),
        }


@pytest.fixture
def calls(tiny_config: ModelConfig) -> Calls:
    return Calls(tiny_config)
