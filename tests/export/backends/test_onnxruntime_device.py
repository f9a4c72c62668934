"""ONNX Runtime with tensors on a device: the CPU provider computes, in the emulated CUDA device's memory and when its stream comes to it."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda

import flamingo_export
from flamingo_export.backends import onnxruntime_device
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.onnxruntime import OnnxRuntimeBackend, session_options
from flamingo_export.backends.onnxruntime_device import CPU_PROVIDER, CUDA_PROVIDER, Place, check_placement
from flamingo_export.backends.tensorrt.cuda import DeviceMemoryError
from flamingo_export.backends.tensorrt.device_memory import DeviceStream
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.errors import BackendError
from flamingo_export.quantize.policies import preset
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_export.sources.choice import source_for_size
from flamingo_export.validate import check_bundle

OPTIONS = SessionOptions(device="cuda", threads=1)
LIMITS = ShapeLimits(max_length=256, chunk=32, batch=3, beams=4)


class HostPlace(Place):
    """Host memory in the place of a GPU's."""

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self.cuda.ask(stream, work)  # type: ignore[attr-defined]

    def providers(self, stream: DeviceStream) -> list[Any]:
        return [CPU_PROVIDER]


def on_device(memory: int = 1 << 32) -> tuple[OnnxRuntimeBackend, FakeCuda]:
    cuda = FakeCuda(memory)
    backend = OnnxRuntimeBackend()
    streams = DeviceStream(cuda, first=True), DeviceStream(cuda, first=False)
    backend._places[0] = HostPlace(cuda, streams, provider=CPU_PROVIDER, device="cpu")
    return backend, cuda


def nano(folder: Path, storage: Any = "fp32", **settings: Any) -> Path:
    path = folder / f"{storage}.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, storage=storage, limits=LIMITS, parity="skip", **settings)
    return path


@pytest.fixture(scope="module")
def nano32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def nano16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano(tmp_path_factory.mktemp("nano"), "fp16")


def pictures(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in range(count)]


def asked() -> list[Request]:
    first, second = pictures(2)
    return [
        Request(prompt="<image>What?", media=[first]),
        Request(prompt="<image>This.<EOC><image>And", media=[second, first]),
        Request(prompt="<image>So", media=[second]),
        Request(prompt="<image>Here is", media=[first]),
    ]


def answers(bundle: Path, backend: OnnxRuntimeBackend, options: SessionOptions) -> list[Any]:
    with Model(bundle, read_manifest(bundle), backend, options) as model:
        found = []
        for settings in (
            {"beams": 1},
            {"beams": 3, "num_return": 3},
            {"temperature": 0.7, "top_k": 4, "seed": 3, "num_return": 2},
        ):
            for result in model.generate(asked(), max_new_tokens=6, **settings):
                found += [(text.token_ids, text.token_logprobs) for text in (result, *result.alternatives)]
        found += [((), score.token_logprobs) for score in model.score(asked()[0], ["one", "another"])]
    return found


@pytest.mark.slow
def test_answers_are_those_of_the_portable_graphs_in_host_memory(nano32: Path) -> None:
    backend, cuda = on_device()
    found = answers(nano32, backend, OPTIONS)
    right = answers(nano32, OnnxRuntimeBackend(), SessionOptions(threads=1))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in right]
    for (_, mine), (_, theirs) in zip(found, right, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    assert cuda.crossed["on device"] > 0  # media, from encoders into the bank


@pytest.mark.slow
def test_graphs_in_fp16_pass_parity_in_fp16(nano16: Path) -> None:
    """Layer by layer too: graphs that parity cuts out are lowered as those of the bundle are."""
    backend, _ = on_device()
    report = check_bundle(nano16, backend=backend, options=OPTIONS)
    assert report.verdict == "passed", report.summary
    assert report.arithmetic == "fp16"
    assert any(row.level == "layer" for row in report.rows)


def steps(bundle: Path, cuda: FakeCuda, backend: OnnxRuntimeBackend, count: int) -> tuple[Any, Any, dict[str, Any]]:
    """A decoder with caches and bank of zeros, after `count` greedy steps of one token."""
    manifest = read_manifest(bundle)
    session = backend.open(bundle, manifest, manifest.graph("decoder"), OPTIONS)
    spec, capacity = session.spec, session.largest["C"]
    caches = {}
    for tensor in spec.inputs:
        if tensor.name.startswith(("past_", "media_k", "media_v")):
            sizes = {"B": 1, "C": capacity, "N": 2}
            buffer = session.allocate(tensor.name, tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape))
            session.bind(tensor.name, buffer)
            caches[tensor.name] = buffer
    for step in range(count):
        known = {
            "token_ids": np.array([[step + 1]]),
            "positions": np.array([[step]]),
            "media_rows": np.zeros((1, 1), np.int64),
            "phi": np.zeros((1, 1), np.int64),
            "first_media": np.zeros((1, 1), np.int64),
            "write_index": np.array([step]),
            "mask": (np.arange(capacity) <= step)[None, None, None],
            "key_positions": np.arange(capacity)[None],
            "logit_positions": np.zeros((1, 1), np.int64),
        }
        fed = {tensor.name: known[tensor.name] for tensor in spec.inputs if tensor.name in known}
        cuda.crossed.clear()
        result = session.run(fed, outputs=("top_ids",))
    return session, caches, result


def test_caches_stay_on_the_device_and_are_written_in_place(nano16: Path) -> None:
    backend, cuda = on_device()
    session, caches, _ = steps(nano16, cuda, backend, 3)
    crossed = dict(cuda.crossed)
    cache = caches["past_k.0"].read()
    assert all(np.abs(cache[0, :, slot]).max() > 0 for slot in range(3))
    assert not cache[0, :, 3:].any()
    # One step: mask and key positions, a few numbers, the best tokens. One cache of one layer alone would be more.
    assert crossed["to device"] < session.largest["C"] * 10 < caches["past_k.0"].nbytes
    assert crossed["to host"] < 200
    session.close()


@pytest.mark.parametrize("policy", ["int8", "int4"])
def test_quantised_graphs_run_in_fp16(policy: str, tmp_path: Path) -> None:
    bundle = nano(tmp_path, "fp16", policy=preset(policy))
    backend, cuda = on_device()
    session, caches, _ = steps(bundle, cuda, backend, 2)
    assert np.isfinite(caches["past_v.5"].read()).all()
    session.close()


def test_weights_that_do_not_fit(nano16: Path) -> None:
    backend, _ = on_device(memory=1 << 20)
    manifest = read_manifest(nano16)
    with pytest.raises(
        DeviceMemoryError, match=r"decoder needs about \d+ MiB on the GPU \(\d+ for itself, .* 1 of 1 MiB are free\. Close"
    ):
        backend.open(nano16, manifest, manifest.graph("decoder"), OPTIONS)


@pytest.mark.slow
def test_parity_on_a_device_is_asked_for_on_the_command_line(nano16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As far as this machine goes: its ONNX Runtime has no CUDA provider, and no gate is said to have passed or failed."""
    from flamingo_export.cli import main

    assert main(["parity", str(nano16), "--backend", "onnxruntime", "--device", "cuda", "--json"]) == 1
    report = capfd.readouterr().out
    assert "has no CUDA provider" in report
    assert '"arithmetic": "fp16"' in report.replace('":"', '": "')
    assert '"verdict": "not_run"' in report.replace('":"', '": "')


def session_with(*nodes: tuple[str, str], providers: tuple[str, ...] = (CUDA_PROVIDER, CPU_PROVIDER)) -> Any:
    parts = [SimpleNamespace(ep_name=provider, get_nodes=lambda op=op: [SimpleNamespace(op_type=op)]) for provider, op in nodes]
    return SimpleNamespace(get_providers=lambda: list(providers), get_provider_graph_assignment_info=lambda: parts)


def test_a_heavy_operator_on_the_cpu_is_an_error_that_names_the_version() -> None:
    cuda = FakeCuda()
    place = Place(cuda, (DeviceStream(cuda, first=True), DeviceStream(cuda, first=False)))
    contract: Any = SimpleNamespace(spec=SimpleNamespace(name="decoder"), compute="bf16")
    check_placement(session_with((CUDA_PROVIDER, "Attention"), (CPU_PROVIDER, "Shape")), place, contract, "1.32.0")
    left = ((CPU_PROVIDER, "Attention"), (CPU_PROVIDER, "Attention"))
    with pytest.raises(
        BackendError, match=r"onnxruntime-gpu 1\.24\.4 leaves Attention \(2\) to the CPU in bf16.* in 1\.25 and later"
    ):
        check_placement(session_with(*left), place, contract, "1.24.4")
    with pytest.raises(BackendError, match=r"leaves Attention \(1\), TensorScatter \(1\) to the CPU"):
        check_placement(session_with((CPU_PROVIDER, "TensorScatter"), (CPU_PROVIDER, "Attention")), place, contract, "1.24.4")
    with pytest.raises(
        BackendError, match=r"CUDAExecutionProvider did not load: onnxruntime 1\.32\.0 runs on CPUExecutionProvider"
    ):
        check_placement(session_with(providers=(CPU_PROVIDER,)), place, contract, "1.32.0")


def test_where_nodes_run_is_what_onnxruntime_says(nano16: Path) -> None:
    """The real call: on the CPU provider all of them do, under the names that are looked for."""
    backend, _ = on_device()
    manifest = read_manifest(nano16)
    session = backend.open(nano16, manifest, manifest.graph("decoder"), OPTIONS)
    opened: Any = session
    found = onnxruntime_device.on_cpu(opened._loaded.session)
    layers = manifest.config.language_model.num_layers
    assert found["Attention"] >= layers
    assert found["TensorScatter"] == 2 * layers


def test_a_bundle_in_bf16_lowers_to_it(tmp_path: Path) -> None:
    """Types alone: the CPU has no kernels for bf16."""
    import onnx

    from flamingo_export.backends.tensorrt.engine_contract import contract_of

    bundle = nano(tmp_path, "bf16")
    manifest = read_manifest(bundle)
    graph = manifest.graph("decoder")
    data, folder, size = onnxruntime_device.lowered(bundle, manifest, graph, contract_of(manifest, graph))
    model = onnx.load_model_from_string(data)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert {kinds[name] for name in ("past_k.0", "present_k.0", "media_k.0", "logits")} == {onnx.TensorProto.BFLOAT16}
    assert size > 1 << 20
    locations = [entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert locations
    assert all((folder / location).is_file() for location in locations)
    casts = [attribute.i for node in model.graph.node if node.op_type == "Cast" for attribute in node.attribute]
    norms = sum(node.op_type in ("LayerNormalization", "RMSNormalization") for node in model.graph.node)
    assert casts.count(onnx.TensorProto.FLOAT) <= norms + 2  # statistics, and sums over the vocabulary


WHEEL = os.environ.get("ONNXRUNTIME_GPU_WHEEL", "")


@pytest.mark.skipif(
    not WHEEL, reason="needs ONNXRUNTIME_GPU_WHEEL: a file of onnxruntime-gpu (pip download --no-deps onnxruntime-gpu)"
)
def test_names_are_those_of_the_gpu_wheel() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        library = wheel.read("onnxruntime/capi/libonnxruntime_providers_cuda.so")
        module = next(name for name in wheel.namelist() if re.search(r"onnxruntime_pybind11_state.*\.so$", name))
        python = wheel.read("onnxruntime/capi/onnxruntime_inference_collection.py").decode()
        core = wheel.read(module) + library
    for name in onnxruntime_device.provider_options(0, 0):
        assert f"{name}\0".encode() in library, name
    for value in ("kSameAsRequested", "HEURISTIC"):
        assert f"{value}\0".encode() in library, value
    settings = session_options(OPTIONS, None)
    assert settings is not None
    for key in (onnxruntime_device.PLACEMENT, onnxruntime_device.UNAWAITED):
        assert key.encode() in core, key
    calls = (
        "def get_provider_graph_assignment_info",
        "def run_with_iobinding",
        "def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr)",
    )
    for call in calls:
        assert call in python, call
    for kernel in (b"TensorScatter", b"onnxruntime4cuda9AttentionI", b"RotaryEmbedding"):
        assert kernel in library, kernel
