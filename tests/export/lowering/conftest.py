"""The tiny model's graphs, portable and lowered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from flamingo_export.backends.tensorrt.lowering.lint import Expected, check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower
from flamingo_export.precision import Precision, StorageType
from flamingo_export.sources import LiveSource
from flamingo_export.specs import subgraph_specs
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

CAPACITY = 32
NONE: frozenset[str] = frozenset()
PLUGIN = frozenset({"PhiCrossAttention"})
Lowered = Callable[..., ir.Model]


@pytest.fixture(scope="session")
def bundles(tiny_bundle: Path, tiny_model: Flamingo, bundle_writer, tmp_path_factory) -> dict[StorageType, Path]:
    """The tiny bundle in each storage type."""
    folder = tmp_path_factory.mktemp("stored")
    others: tuple[StorageType, ...] = ("fp16", "bf16")
    made = {
        kind: bundle_writer(LiveSource(tiny_model), folder / f"{kind}.bundle", precision=Precision(storage=kind))
        for kind in others
    }
    return {"fp32": tiny_bundle, **made}


@pytest.fixture
def lowered(bundles: dict[StorageType, Path]) -> Lowered:
    """Lowers a graph of the tiny bundle: name, compute type, functions that have a plugin."""

    def get(name: str, compute: StorageType = "fp16", native: frozenset[str] = NONE, storage: StorageType | None = None):
        model = ir.load(bundles[storage or compute] / f"{name}.onnx")
        return lower(model, compute=compute, capacity=CAPACITY, native_functions=native)

    return get


@pytest.fixture
def lint(tiny_config: ModelConfig) -> Callable[..., Expected]:
    """The lint of a lowered graph of the tiny model."""

    def check(model: ir.Model, name: str = "decoder", compute: StorageType = "fp16", native: frozenset[str] = NONE):
        spec = subgraph_specs(tiny_config)[name]
        return check_graph(model, spec, compute=compute, capacity=CAPACITY, native_functions=native)

    return check
