"""What is checked before an engine is run, which backend `auto` takes, and going on with another one. The GPU and TensorRT are fakes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_gpu import TARGET, add_engines
from fake_tensorrt import Context

import flamingo_export
from flamingo_export.backends.registry import availability, get_backend
from flamingo_export.backends.tensorrt import backend as backend_module
from flamingo_export.backends.tensorrt import library, plugin
from flamingo_export.backends.tensorrt.cuda import DeviceLost, DeviceMemoryError
from flamingo_export.backends.tensorrt.engine_contract import contract_of, resident_bytes
from flamingo_export.bundle.manifest import read_manifest, write_manifest
from flamingo_export.bundle.verify import file_record
from flamingo_export.errors import BackendError, BackendLost, BundleError, CapacityError, IncompatibleEngine
from flamingo_export.runtime.request import Request
from tests.export.bundle.bundle_of_0_1_0 import ROOT, unpack

REBUILD = r"flamingo-export build .*--backend tensorrt-rtx --target sm89 --out .*x\.bundle --overwrite"


@pytest.fixture
def bundle(gpu, tiny_bundle, tmp_path) -> Path:
    return add_engines(tiny_bundle, tmp_path / "x.bundle", chunk=16, bank_rows=8)


def alter(bundle: Path, graph: str = "decoder", **changes: Any) -> None:
    """Changes what the manifest says of an engine."""
    manifest = read_manifest(bundle)
    engines = tuple(
        msgspec.structs.replace(engine, **changes) if engine.graph == graph else engine for engine in manifest.engines
    )
    write_manifest(bundle, msgspec.structs.replace(manifest, engines=engines))


def refused(bundle: Path, words: str, kind: type[Exception] = IncompatibleEngine) -> None:
    with pytest.raises(kind, match=words):
        flamingo_export.load(bundle, backend="tensorrt-rtx")


def test_auto_takes_engines_that_fit(bundle, tiny_bundle, monkeypatch):
    for made, name in ((bundle, "tensorrt-rtx"), (tiny_bundle, "onnxruntime")):
        with flamingo_export.load(made) as model:
            assert model.backend.name == name
    assert availability()["tensorrt-rtx"].detail == "TensorRT for RTX on a GPU of sm89"
    assert get_backend("auto").name == "onnxruntime"
    with monkeypatch.context() as patched:
        patched.setattr(library, "device", lambda index=0: library.Device(target="sm120"))
        with flamingo_export.load(bundle) as model:
            assert model.backend.name == "onnxruntime"

    with monkeypatch.context() as patched:
        patched.setattr(library, "device", lambda index=0: library.Device(target=("sm120", "sm89")[index]))
        with flamingo_export.load(bundle, device="cuda:1") as model:  # the engines are for the second one
            assert model.backend.name == "tensorrt-rtx"
        with flamingo_export.load(bundle) as model:
            assert model.backend.name == "onnxruntime"

    def broken(which):
        raise BackendError("it does not load")

    monkeypatch.setattr(library, "load", broken)
    with flamingo_export.load(bundle) as model:
        assert model.backend.name == "onnxruntime"


def test_no_engine_for_this_gpu(bundle, monkeypatch):
    monkeypatch.setattr(library, "device", lambda index=0: library.Device(target="sm120"))
    words = r"no tensorrt-rtx engine of vision_encoder .*\(sm120\), it has for sm89\. Build it: flamingo-export build .*--target sm120"
    refused(bundle, words)


def test_no_engines_at_all(gpu, tiny_bundle):
    refused(tiny_bundle, "it has none. Build it: flamingo-export build")


def test_another_version(bundle):
    alter(bundle, tool_version="1.6.0.1")
    refused(bundle, r"built by tensorrt-rtx 1\.6\.0\.1, here is 1\.7\.1\.116.*" + REBUILD)
    assert flamingo_export.load(bundle).backend.name == "onnxruntime"


def test_another_type_than_the_bundle(bundle):
    alter(bundle, compute="fp16")
    refused(bundle, "computes in fp16, the bundle's weights are fp32.*" + REBUILD)


def test_an_engine_that_was_altered(bundle):
    alter(bundle, sha256="0" * 64)
    refused(bundle, "is not the file that was built.*" + REBUILD)


def test_an_engine_that_is_missing(bundle):
    (bundle / read_manifest(bundle).engines[0].file).unlink()
    refused(bundle, "is missing", BundleError)


def replaced(bundle: Path, data: bytes, graph: str = "decoder") -> None:
    """Another engine file, which the manifest agrees with."""
    manifest = read_manifest(bundle)
    (record,) = (engine for engine in manifest.engines if engine.graph == graph)
    (bundle / record.file).write_bytes(data)
    file = file_record(bundle, bundle / record.file)
    files = tuple(file if each.path == file.path else each for each in manifest.files)
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    alter(bundle, graph, sha256=file.sha256, size=file.size)


def test_engines_of_0_1_0_are_refused_with_the_command_and_its_graphs_run(gpu, tmp_path):
    """They had one profile for steps; there is one for each size of a batch now, and others for shared rows."""
    earlier = unpack(tmp_path / "earlier.bundle")
    manifest = read_manifest(earlier)
    contract = contract_of(manifest, manifest.graph("decoder"))
    profiles = [
        {tensor.name: contract.bounds(tensor, each) for tensor in contract.spec.inputs} for each in contract.profiles[:2]
    ]
    assert len(contract.profiles) > 2
    made = add_engines(earlier, tmp_path / "x.bundle", changes={"decoder": {"profiles": profiles}})
    assert read_manifest(made).tools["flamingo-export"] == "0.1.0"
    words = rf"2 profiles, expected {len(contract.profiles)}.*flamingo-export build --size nano .*--backend tensorrt-rtx"
    refused(made, words)
    with flamingo_export.load(made, backend="tensorrt-rtx", fallback="onnxruntime") as model:
        assert model.backend.name == "onnxruntime"
        assert model.generate("<image>Output:", images=[ROOT / "examples" / "a.png"], beams=3).text == "two green triangles"


def test_a_file_that_is_no_engine(bundle):
    replaced(bundle, b"not an engine")
    refused(bundle, r"does not take .*decoder\.engine: magicTag Assertion failed.*" + REBUILD)


@pytest.mark.parametrize(
    ("graph", "changes", "words"),
    [
        ("decoder", {"profiles": []}, "0 profiles, expected 3"),
        ("decoder", {"aliases": {}}, r"present_k\.0 is not past_k\.0 updated in place"),
        ("media_kv", {"graph": "resampler.onnx"}, "input features is not in the contract"),
    ],
)
def test_an_engine_that_is_another_one(gpu, tiny_bundle, tmp_path, graph, changes, words):
    if "graph" in changes:
        changes = {"graph": str(tiny_bundle / changes["graph"])}
    made = add_engines(tiny_bundle, tmp_path / "x.bundle", changes={graph: changes})
    refused(made, f"is not the engine that this bundle needs: .*{words}.*" + REBUILD)


def test_other_limits_than_those_it_was_built_for(bundle):
    manifest = read_manifest(bundle)
    write_manifest(bundle, msgspec.structs.replace(manifest, limits=msgspec.structs.replace(manifest.limits, batch=7)))
    refused(
        bundle,
        r"decoder\.engine is not the engine .*token_ids takes \(1, 1\) to \(8, 16\) in profile prefill, expected .*\(7, 16\)",
    )


def test_another_plugin(bundle, monkeypatch):
    alter(bundle, plugin_sha256="1" * 64)

    def load(trt, path=None, *, expected=None, target=None):
        assert target == TARGET  # the card whose code the library must have
        raise IncompatibleEngine(f"the engine was built with {expected[:4]}")

    monkeypatch.setattr(plugin, "load", load)
    refused(bundle, "the engine was built with 1111")


def test_no_driver_no_cuda_python(bundle, monkeypatch):
    monkeypatch.setattr(library, "cuda_python", lambda: False)
    refused(bundle, "cuda-python is not.*pip install 'cuda-bindings", BackendError)
    monkeypatch.setattr(library, "device", lambda index=0: None)
    refused(bundle, "there is no NVIDIA driver or GPU", BackendError)
    assert flamingo_export.load(bundle).backend.name == "onnxruntime"


def test_a_gpu_that_is_too_small(bundle, gpu):
    gpu.cuda.free_memory = lambda: (10, 1 << 30)
    refused(bundle, r"needs about \d+ MiB on the GPU, \d+ of \d+ MiB are free.*--fallback onnxruntime", DeviceMemoryError)


def test_bank_and_caches_are_counted_when_an_engine_is_opened(bundle, gpu):
    """The engine alone would fit: what a request needs beside it would not."""
    manifest = read_manifest(bundle)
    contract = contract_of(manifest, manifest.graph("decoder"))
    bank, row = resident_bytes(contract)
    lm, limits = manifest.config.language_model, manifest.limits
    assert row == 2 * lm.num_layers * lm.kv_heads * limits.max_length * lm.head_size * 4
    media = manifest.config.cross_attention
    gated = len(manifest.config.gated_layers)
    assert bank == 2 * gated * limits.bank_rows * manifest.config.resampler.num_latents * media.num_heads * media.head_size * 4
    assert resident_bytes(contract_of(manifest, manifest.graph("media_kv"))) == (0, 0)
    engine = (bundle / manifest.engines[-1].file).stat().st_size
    words = rf"decoder\.engine needs about .*each request's cache of {limits.max_length} slots\).*are free"
    gpu.cuda.free_memory = lambda: (engine + bank + row // 2, 1 << 30)
    refused(bundle, words, DeviceMemoryError)


def test_memory_that_runs_out_while_loading(bundle, gpu):
    gpu.trt.said = "Error Code 2: OutOfMemory (Requested size was 123 bytes.)"
    refused(
        bundle,
        r"needs about \d+ MiB on the GPU and was not loaded: Error Code 2.* \d+ of \d+ MiB are free.*--fallback",
        DeviceMemoryError,
    )


def test_a_runtime_that_does_not_start(bundle, gpu, monkeypatch):
    """An old driver: TensorRT says so and gives nothing, of which its bindings make a TypeError (tests/plugin/test_datacenter_names.py)."""

    def nothing(logger):
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(gpu.trt, "Runtime", nothing)
    refused(bundle, "does not start here: the NVIDIA driver is missing or too old", BackendError)


def test_memory_that_runs_out_while_running(bundle, gpu, monkeypatch):
    """The process goes on, and so does the model once memory is free again."""
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        expected = model.generate([1, 5, 6], max_new_tokens=2).token_ids
        run = Context.execute_async_v3

        def short(context, stream):
            gpu.trt.error("Error Code 2: OutOfMemory (Requested size was 123 bytes.)")
            return False

        monkeypatch.setattr(Context, "execute_async_v3", short)
        with pytest.raises(
            DeviceMemoryError, match=r"decoder failed in TensorRT .*Requested size was 123.* MiB are free.*smaller batches"
        ):
            model.generate([1, 7, 6], max_new_tokens=2)
        monkeypatch.setattr(Context, "execute_async_v3", run)
        assert model.generate([1, 5, 6], max_new_tokens=2).token_ids == expected


def test_memory_that_runs_out_for_bank_and_cache(bundle, gpu):
    """The process goes on, and can open the same bundle when memory is free again."""
    enough = gpu.cuda.memory
    gpu.cuda.fail["malloc"] = DeviceMemoryError("cudaErrorMemoryAllocation", "CUDA is out of memory")
    refused(bundle, "CUDA is out of memory", DeviceMemoryError)
    gpu.cuda.fail.clear()
    gpu.cuda.memory = enough
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        gpu.cuda.fail["malloc"] = DeviceMemoryError("cudaErrorMemoryAllocation", "CUDA is out of memory")
        with pytest.raises(CapacityError, match="no memory for a cache of 1 x 96 slots"):
            model.generate([1, 5, 6], max_new_tokens=2)
        gpu.cuda.fail.clear()
        assert model.generate([1, 5, 6], max_new_tokens=2).token_ids


def test_a_cache_that_does_not_fit_says_what_would(bundle, gpu):
    """Of the four rows (a power of two) that a batch of three wants there is room for two, counting what the smaller cache gives back."""
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        model.generate([1, 5, 6], max_new_tokens=2)
        one = sum(buffer.nbytes for buffer in model.engine.loop.cache._buffers.values())
        gpu.cuda.memory = gpu.cuda.used + one + one // 2
        prompts = [Request(prompt=[1, 5, 6 + each]) for each in range(3)]
        with pytest.raises(
            CapacityError, match=r"a cache of 4 x 96 slots: it takes \d+ MiB, of which \d+ MiB are there, enough for 2 rows"
        ):
            model.generate(prompts, max_new_tokens=2, batch_size=3)


def test_a_gpu_that_is_lost_fails_all_requests_with_the_reason(bundle, gpu):
    """Those that run, those that wait, and those that come later; nothing is asked of the device any more."""
    reason = DeviceLost("cudaErrorIllegalAddress", "cudaStreamSynchronize failed with cudaErrorIllegalAddress. Start it again.")
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        assert model.generate([1, 5, 6], max_new_tokens=2).token_ids
        gpu.cuda.fail["synchronize"] = reason
        with pytest.raises(BackendLost, match="cudaErrorIllegalAddress"):
            model.generate([Request(prompt=[1, 5, 6 + each]) for each in range(5)], max_new_tokens=2)
        assert model.engine.lost is reason
        assert model.engine.stats().running == model.engine.stats().waiting == 0
        gpu.cuda.fail.clear()
        before = gpu.cuda.calls.total()
        with pytest.raises(BackendLost, match="Start it again"):
            model.generate([1, 5, 6], max_new_tokens=2)
        assert gpu.cuda.calls.total() == before


def test_going_on_with_another_backend(bundle, monkeypatch, caplog):
    alter(bundle, tool_version="1.6.0.1")
    with (
        caplog.at_level(logging.WARNING),
        flamingo_export.load(bundle, backend="tensorrt-rtx", fallback="onnxruntime") as model,
    ):
        assert model.backend.name == "onnxruntime"
    assert "using onnxruntime instead" in caplog.text
    assert "here is 1.7.1.116" in caplog.text
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10})())
    with pytest.raises(
        BackendError,
        match=r"here is 1\.7\.1\.116.*--fallback onnxruntime: the weights of .* take \d+ MiB .*; 0 MiB are available",
    ):
        flamingo_export.load(bundle, backend="tensorrt-rtx", fallback="onnxruntime")


def test_fallback_on_the_command_line(bundle, capfd):
    from flamingo_export.cli import main

    alter(bundle, tool_version="1.6.0.1")
    arguments = [
        "bench",
        str(bundle),
        "--backend",
        "tensorrt-rtx",
        "--images",
        "1",
        "--prompt-tokens",
        "20",
        "--new-tokens",
        "2",
    ]
    assert main([*arguments, "--repeat", "1"]) == 1
    assert "built by tensorrt-rtx 1.6.0.1" in capfd.readouterr().err
    assert main([*arguments, "--repeat", "1", "--fallback", "onnxruntime"]) == 0
    told = capfd.readouterr()
    assert "onnxruntime" in told.out
    assert "using onnxruntime instead" in told.err


def test_compiled_kernels_are_kept(bundle, gpu, tmp_path):
    folder = tmp_path / ".cache" / "flamingo-export" / "kernels"
    for times in (1, 2):
        with flamingo_export.load(bundle, backend="tensorrt-rtx"):
            pass
        kept = sorted(folder.iterdir())
        assert [path.read_bytes() for path in kept] == [b"kernel;" * times] * 4
        assert all(path.name.startswith("tensorrt-rtx-1.7.1.116-sm89-") for path in kept)


def test_doctor_tells_it(gpu):
    from flamingo_export.cli.doctor import examine

    found = {task.name: task for task in examine(Path()).tasks}
    assert found["run engines (--backend tensorrt-rtx)"].found
    assert not found["run engines (--backend tensorrt)"].found


def test_cuda_before_tensorrt(bundle, gpu, monkeypatch):
    """TensorRT's runtime ends the process where there is no driver: it must not be reached."""

    def none(device=0):
        raise BackendError("no driver")

    monkeypatch.setattr(backend_module, "CudaRuntime", none)
    gpu.trt.Runtime = None
    refused(bundle, "no driver", BackendError)


def test_the_gpu_that_is_named_is_the_one_that_is_opened(bundle, gpu, monkeypatch):
    """Its own streams and memory; a GPU that is not there is named."""

    asked = []
    monkeypatch.setattr(library, "device", lambda index=0: library.Device(target="sm89") if index < 2 else None)
    monkeypatch.setattr(backend_module, "CudaRuntime", lambda device=0: asked.append(device) or gpu.cuda)  # type: ignore[func-returns-value]
    with flamingo_export.load(bundle, backend="tensorrt-rtx", device="cuda:1") as model:
        model.generate(Request(prompt=[1, 5, 6]), beams=1, max_new_tokens=2)
    assert asked == [1]
    with pytest.raises(BackendError, match=r"there is no GPU number 2 here, there is cuda:0\. They are counted from 0"):
        flamingo_export.load(bundle, backend="tensorrt-rtx", device="cuda:2")


def test_a_profile_that_is_refused_is_an_error_of_ours(bundle, monkeypatch):
    """The bindings raise RuntimeError, and never return False."""

    def refuses(self, profile, stream):
        raise RuntimeError("profile index out of range")

    monkeypatch.setattr(Context, "set_optimization_profile_async", refuses)
    with (
        flamingo_export.load(bundle, backend="tensorrt-rtx") as model,
        pytest.raises(BackendError, match=r"did not take profile \d: profile index out of range"),
    ):
        model.generate(Request(prompt=[1, 5, 6]), beams=1, max_new_tokens=2)
