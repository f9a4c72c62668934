"""The stages of scripts/gpu_check, in order. A stage says first what it lacks; to add one, append a Stage to STAGES."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from typing import Any

from gpu import kernel_build
from gpu.engines import (
    engines,
    fp8_against_fp16,
    rehearse_cli,
    rehearse_onnxruntime,
    run_cli,
    run_onnxruntime,
    without_cuda_provider,
    without_fp8,
    without_rtx,
    without_tensorrt,
)
from gpu.runtime import judged, rehearse_nano, rehearse_sessions, run_nano, run_sessions, without_runtime
from gpu.stage import Context, Failed, NoDevice, NoTime, NotPossible, Stage

FOLDER = kernel_build.ROOT / "build" / "gpu_check"


def nothing_missing(_: Context) -> str | None:
    return None


def without_nvcc(context: Context) -> str | None:
    return None if context.nvcc else "nvcc (the CUDA toolkit, 12.0 or later)"


def without_library(context: Context) -> str | None:
    return None if context.kernels_file else "the kernels' library, for want of nvcc or because it did not build"


def emulate(context: Context) -> dict[str, Any]:
    """The kernels' code on the CPU: fragments, tiles, runs, races. Needs only a C++ compiler."""
    outputs = {}
    for program, arguments in (
        ("test_layout", []),
        ("test_blocks", [str(context.seed), "1"]),
        ("test_range", [str(context.seed), "1"]),
    ):
        try:
            outputs[program] = kernel_build.run(
                [str(kernel_build.build_emulation(FOLDER, program)), *arguments], timeout=1800
            ).strip()
        except kernel_build.BuildFailed as error:
            raise Failed(str(error)) from error
    return outputs


def compile_kernels(context: Context) -> dict[str, Any]:
    """The library for the device's architecture, or sm_90 where there is none; no kernel may spill."""
    assert context.nvcc
    architecture = context.architecture or "90"
    try:
        context.kernels_file, resources = kernel_build.build_library(context.nvcc, architecture, FOLDER)
    except kernel_build.BuildFailed as error:
        raise Failed(str(error)) from error
    result = {"architecture": architecture, "kernels": [r.as_json() for r in resources]}
    spilled = [r.kernel for r in resources if r.spilled]
    if spilled or not resources:
        raise Failed(f"kernels that spill registers: {spilled}" if spilled else "ptxas named no kernel", result)
    return result


def without_headers(context: Context) -> str | None:
    if context.kernels_file is None:
        return without_library(context)
    if os.environ.get("TENSORRT_ROOT") or kernel_build.find_headers():
        return None
    return "TensorRT's headers (docs/plugin.md says where to get them; TENSORRT_ROOT=folder that holds include/)"


def compile_plugin(context: Context) -> dict[str, Any]:
    """The plugin library around those kernels, taken as TensorRT takes it up to the point where a GPU is wanted."""
    from gpu import kernel_cases, range_cases
    from gpu.kernel_library import ThroughPlugin

    assert context.nvcc
    try:
        headers = kernel_build.find_headers()
        assert headers
        context.plugin, driver = kernel_build.build_plugin(context.nvcc, context.architecture or "90", headers, FOLDER)
        context.through_plugin = ThroughPlugin(driver, context.plugin)
        context.ranges_through_plugin = range_cases.RangeKernels(driver)
    except (kernel_build.BuildFailed, OSError, ValueError) as error:
        raise Failed(str(error)) from error
    found = {
        "shapes": kernel_cases.check_shapes(context.through_plugin, context.seed),
        "range_shapes": range_cases.check_shapes(context.ranges_through_plugin, context.seed),
    }
    failures = [failure for each in found.values() for failure in each["failures"]]
    if failures:
        raise Failed(f"shapes that a plugin does not take as it should: {failures[0]}", found)
    return {"plugin_sha256": hashlib.sha256(context.plugin.read_bytes()).hexdigest(), **found}


def call_device(context: Context) -> dict[str, Any]:
    """The first CUDA calls: a launch through the library, then the device's name. Raises NoDevice."""
    import ctypes

    from gpu.kernel_library import Args, Kernels

    assert context.kernels_file
    context.kernels = Kernels(context.kernels_file)
    if context.architecture is None:
        address = (
            ctypes.addressof(ctypes.create_string_buffer(64)) // 16 * 16 + 16
        )  # never read: without a device nothing is launched
        args = Args(*[address] * 5, None, None, address, 1, 1, 1, 64, 64, 1, 1, 0.125, 1, 1)
        ways = {"the kernels": context.kernels, "the plugin": context.through_plugin}
        errors = [f"{name} with {error}" for name, way in ways.items() if way is not None and (error := _refusal(way, args))]
        if len(errors) < sum(way is not None for way in ways.values()):
            raise NoDevice("torch sees no CUDA device, though a launch did not fail: is this torch built without CUDA?")
        raise NoDevice(f"the first CUDA call failed, of {', of '.join(errors)}")
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
    }


def _refusal(kernels: Any, args: Any) -> Exception | None:
    from gpu.kernel_library import CudaFailed

    try:
        kernels.launch(args)
    except CudaFailed as error:
        return error
    return None


def without_plugin(context: Context) -> str | None:
    return None if context.through_plugin is not None else "the plugin, which was not built"


def test_plugin(context: Context) -> dict[str, Any]:
    """`enqueue` of both plugins against the fp64 oracle and in captured graphs; no library of TensorRT is wanted.

    The kernels' own stage runs every case; these are to show that nothing is lost on the way, the workspace of keys that are split included.
    """
    from gpu import kernel_cases, range_cases

    cases = (case for case in kernel_cases.all_cases() if case.latents in (64, 100))
    ranges = (case for case in range_cases.all_cases() if case.keys in (100, 1601) and case.head_size in (64, 128))
    return judged({
        "seed": context.seed,
        "oracle": kernel_cases.check(context.through_plugin, cases, context.seed),
        "graph_replay": kernel_cases.check_graph_replay(context.through_plugin, context.seed),
        "range_oracle": range_cases.check(context.ranges_through_plugin, ranges, context.seed),
        "range_graph_replay": range_cases.check_graph_replay(context.ranges_through_plugin, context.seed),
    })  # fmt: skip


def test_kernels(context: Context) -> dict[str, Any]:
    """Every case against the fp64 oracle, graph replay, refusals."""
    from gpu import kernel_cases, range_cases

    assert context.kernels_file
    ranges = range_cases.RangeKernels(context.kernels_file)
    return judged({
        "rule": "error against fp64 at most twice torch's in the same dtype, plus one rounding unit",
        "seed": context.seed,
        "oracle": kernel_cases.check(context.kernels, kernel_cases.all_cases(), context.seed),
        "graph_replay": kernel_cases.check_graph_replay(context.kernels, context.seed),
        "refusals": kernel_cases.check_refusals(context.kernels),
        "range_oracle": range_cases.check(ranges, range_cases.all_cases(), context.seed),
        "range_graph_replay": range_cases.check_graph_replay(ranges, context.seed),
        "range_refusals": range_cases.check_refusals(ranges),
    })  # fmt: skip


def without_sanitizer(context: Context) -> str | None:
    if context.kernels_file is None:
        return without_library(context)
    return None if find_sanitizer() else "compute-sanitizer (with the CUDA toolkit)"


def find_sanitizer() -> str | None:
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


_NOT_HERE = ("device not supported", "not supported on this", "no attachable process")
_NO_DEVICE = ("no nvidia driver", "not compiled with cuda", "no cuda-capable device", "no cuda gpus")


def sanitize(context: Context) -> dict[str, Any]:
    """memcheck, racecheck and synccheck over one case of each kernel and type.

    API calls that fail are left to the API's callers: PyTorch asks for what a card may not have, and takes no for an answer.
    """
    sanitizer = find_sanitizer()
    assert sanitizer
    results, failures = {}, []  # type: ignore[var-annotated]
    script = [sys.executable, str(kernel_build.ROOT / "scripts" / "gpu_check"), "--few-cases", str(context.kernels_file)]
    for tool in ("memcheck", "racecheck", "synccheck"):
        own = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [sanitizer, "--tool", tool, *own, "--error-exitcode", "9", "--kernel-regex", "kns=flamingo", *script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(150.0, context.seconds), check=False)
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            if context.seconds <= 150:
                raise NoTime(f"{tool} was not done when the time was up; before it: {results}") from error
            results[tool] = "not done after 150 s"
            failures.append(tool)
            continue
        if done.returncode and any(words in output.lower() for words in _NO_DEVICE):
            raise NoDevice(output.strip().splitlines()[-1])
        if done.returncode and any(words in output.lower() for words in _NOT_HERE):
            raise NotPossible(f"compute-sanitizer refuses this device: {output.strip().splitlines()[-1]}")
        results[tool] = "clean" if done.returncode == 0 else output[-2000:]
        if results[tool] != "clean":
            failures.append(tool)
    if failures:
        raise Failed(f"compute-sanitizer: {', '.join(failures)}: {results[failures[0]][-300:]}", results)
    return results


def benchmark(context: Context) -> dict[str, Any]:
    """Times and ratios. Targets that are not reached are reported, and fail nothing: they belong to the card."""
    sys.path.insert(0, str(kernel_build.ROOT / "benchmarks"))
    import phi_attention_gpu

    try:
        result: dict[str, Any] = phi_attention_gpu.measure(context.kernels, context.rounds)
    except MemoryError as error:
        raise NotPossible(str(error)) from error
    return result


_ENGINE = ("build", "plugin-build")
_RTX_FP8 = fp8_against_fp16("tensorrt-rtx")


def _engines(name: str, commands: Any, missing: Any, *, rtx: bool, value: float, seconds: float) -> Stage:
    return Stage(
        name, missing, run_cli(*commands), rehearse=rehearse_cli(*commands),
        needs=() if rtx else _ENGINE, value=value, seconds=seconds,
    )  # fmt: skip


STAGES: list[Stage] = [
    Stage("build", without_nvcc, compile_kernels, value=1, seconds=60),
    Stage("device", without_library, call_device, needs=("build",), value=1, seconds=3),
    Stage("kernels", without_library, test_kernels, needs=("build", "device"), value=100, seconds=100),
    Stage("runtime", without_runtime, run_sessions, rehearse=rehearse_sessions, needs=("build", "device"), value=60, seconds=20),
    Stage("nano", without_runtime, run_nano, rehearse=rehearse_nano, needs=("build", "device"), value=60, seconds=60),
    Stage("benchmark", without_library, benchmark, needs=("build", "device"), value=60, seconds=60),
    Stage("plugin-build", without_headers, compile_plugin, needs=("build",), value=5, seconds=30),
    Stage("plugin", without_plugin, test_plugin, needs=("build", "plugin-build", "device"), value=20, seconds=50),
    Stage("sanitizer", without_sanitizer, sanitize, needs=("build", "device"), value=20, seconds=150),
    Stage("emulation", nothing_missing, emulate, value=1, seconds=60),
    _engines("tensorrt", engines("tensorrt"), without_tensorrt, rtx=False, value=50, seconds=300),
    _engines("tensorrt-rtx", engines("tensorrt-rtx"), without_rtx, rtx=True, value=30, seconds=300),
    _engines("tensorrt-quantised", engines("tensorrt", quantised=True), without_fp8(without_tensorrt), rtx=False, value=20, seconds=400),
    _engines("tensorrt-rtx-quantised", engines("tensorrt-rtx", quantised=True), without_fp8(without_rtx), rtx=True, value=10, seconds=400),
    _engines("tensorrt-fp8-3b", fp8_against_fp16("tensorrt"), without_fp8(without_tensorrt), rtx=False, value=10, seconds=600),
    _engines("tensorrt-rtx-fp8-3b", _RTX_FP8, without_fp8(without_rtx), rtx=True, value=5, seconds=600),
    Stage("onnxruntime-cuda", without_cuda_provider, run_onnxruntime, rehearse=rehearse_onnxruntime, value=10, seconds=200),
]  # fmt: skip
