"""Tables of distances are given to the graph cut to what the cache reaches: the numbers of the whole table, nothing read beyond."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.cut_tables import CutTables
from flamingo_export.backends.registry import get_backend
from flamingo_export.backends.tensorrt.lowering.lower import lower
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.precision import Precision, StorageType
from flamingo_export.sources.live import LiveSource
from flamingo_export.validate.checks.case_runs import layer_session
from flamingo_export.validate.checks.layer_graph import layer_graph
from flamingo_export.weights import DISTANCE_BLOCK, WeightIndex
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

from .test_onnxruntime import bind_all, feeds

TABLE = "decoder/layer.0/self_attention/distances"


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """Three blocks of distances, the last one padded."""
    return msgspec.structs.replace(
        tiny_config, language_model=msgspec.structs.replace(tiny_config.language_model, max_positions=300)
    )


@pytest.fixture
def bundle(config: ModelConfig, bundle_writer: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    storage: StorageType = getattr(request, "param", "fp32")
    return bundle_writer(LiveSource(Flamingo(config)), tmp_path / "long.bundle", precision=Precision(storage=storage))


def open_decoder(bundle: Path):
    manifest = read_manifest(bundle)
    return get_backend("onnxruntime").open(bundle, manifest, manifest.graph("decoder"), SessionOptions(threads=1))


def spoil_beyond(bundle: Path, block: int) -> None:
    """Tables from this block on are NaN."""
    index = WeightIndex.read(bundle)
    for name in index:
        if name.endswith("/distances"):
            table = np.array(index.read_tensor(bundle, name))
            table[:, :, block:] = np.nan
            with (bundle / index[name].file).open("r+b") as file:
                file.seek(index[name].offset)
                file.write(table.tobytes())


@pytest.mark.parametrize("bundle", ["fp32", "fp16", "bf16"], indirect=True)
def test_the_numbers_of_the_whole_table_at_every_capacity(bundle: Path) -> None:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    whole = onnxruntime.InferenceSession(bundle / "decoder.onnx", settings, providers=["CPUExecutionProvider"])
    session = open_decoder(bundle)
    for capacity, write_index in ((8, 0), (130, 120), (300, 290), (128, 3)):
        buffers = bind_all(session, batch=2, capacity=capacity)
        rng = np.random.default_rng(capacity)
        for name, buffer in buffers.items():
            if name.startswith("past"):
                buffer.array[:] = rng.normal(size=buffer.shape)
        given = feeds(batch=2, size=3, capacity=capacity, write_index=write_index)
        bound = {name: buffer.read() for name, buffer in buffers.items()}
        (expected,) = whole.run(["logits"], given | bound)
        assert (session.run(given)["logits"] == expected).all()
    session.close()


def test_no_distance_beyond_the_cache_is_read(bundle: Path) -> None:
    spoil_beyond(bundle, 1)
    session = open_decoder(bundle)
    for capacity, finite in ((128, True), (129, False), (100, True)):
        bind_all(session, batch=1, capacity=capacity)
        logits = session.run(feeds(batch=1, size=2, capacity=capacity, write_index=capacity - 2))["logits"]
        assert np.isfinite(logits).all() == finite
    session.close()


def test_a_layer_by_itself_has_its_own_table_and_takes_it_cut(bundle: Path, tmp_path: Path) -> None:
    """Parity within a memory limit runs layers one by one, cut out of the decoder's graph."""
    manifest, backend = read_manifest(bundle), get_backend("onnxruntime")
    table = "decoder/layer.1/self_attention/distances"
    lowered = lower(layer_graph(bundle, manifest, 1, name="layer"), compute="fp32", capacity=200, native_functions=frozenset())
    (part,) = [node for node in lowered.graph if node.op_type == "Slice"]
    assert part.inputs[0] is not None
    assert part.inputs[0].name == table
    assert [name for name in lowered.graph.initializers if name.endswith("/distances")] == [table]
    spoil_beyond(bundle, 1)
    for capacity, finite in ((128, True), (129, False)):
        with layer_session(backend, bundle, manifest, 1, tmp_path, SessionOptions(threads=1)) as session:
            bind_all(session, batch=1, capacity=capacity)  # type: ignore[arg-type]
            given = feeds(batch=1, size=2, capacity=capacity, write_index=capacity - 2)
            given["hidden"] = np.ones((1, 2, manifest.config.language_model.width), np.float32)
            wanted = {tensor.name for tensor in session.spec.inputs}
            results = session.run({name: value for name, value in given.items() if name in wanted})
        assert np.isfinite(results["hidden_out"]).all() == finite


def test_tables_are_cut_anew_when_another_number_of_blocks_is_in_use(bundle: Path) -> None:
    whole = np.array(WeightIndex.read(bundle).read_tensor(bundle, TABLE))
    tables = CutTables(bundle, [TABLE])
    for capacity, blocks in ((1, 1), (128, 0), (129, 2), (256, 0), (257, 3), (4096, 3), (5, 1)):
        given: dict[str, np.ndarray] = {}
        tables.fit(capacity, given.__setitem__)
        assert list(given) == ([TABLE] if blocks else [])
        if blocks:
            assert (given[TABLE] == whole[:, :, :blocks]).all()
            assert given[TABLE].flags.c_contiguous
    assert whole.shape[2:] == (3, DISTANCE_BLOCK)


def test_tables_that_could_not_all_be_cut_are_given_again(bundle: Path) -> None:
    names = [name for name in WeightIndex.read(bundle) if name.endswith("/distances")]
    tables = CutTables(bundle, names)
    given: list[str] = []

    def bind(name: str, _: np.ndarray) -> None:
        given.append(name)
        if len(given) == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        tables.fit(10, bind)
    tables.fit(10, bind)
    assert given[2:] == names
    tables.fit(10, bind)
    assert len(given) == 2 + len(names)
