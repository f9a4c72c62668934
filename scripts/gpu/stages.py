"""The stages of scripts/gpu_check, in order. A stage says first what it lacks; to add one, append a Stage to STAGES."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import build

FOLDER = build.ROOT / "build" / "gpu_check"


class NoDevice(Exception):
    """The first CUDA call failed: no device, no driver, or one too old."""


@dataclass
class Context:
    """What the stages share. `architecture`: the device's ("90"), or None without one. What follows `nvcc` is set by the stages that make it."""

    seed: int
    rounds: int
    architecture: str | None
    nvcc: str | None = None
    library: Path | None = None
    kernels: Any = None
    plugin: Path | None = None
    through_plugin: Any = None


class Failed(Exception):
    """A stage found something wrong; `result` goes into the report."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


@dataclass(frozen=True)
class Stage:
    """missing(context): what is not installed, or None. run(context): its results; raises Failed, or NoDevice where a GPU is wanted."""

    name: str
    missing: Callable[[Context], str | None]
    run: Callable[[Context], dict[str, Any]]


def nothing_missing(_: Context) -> str | None:
    return None


def without_nvcc(context: Context) -> str | None:
    return None if context.nvcc else "nvcc (the CUDA toolkit, 12.0 or later)"


def without_library(context: Context) -> str | None:
    return None if context.library else "the kernels' library, for want of nvcc or because it did not build"


def emulate(context: Context) -> dict[str, Any]:
    """The kernels' code on the CPU: fragments, tiles, runs, races. Wants a C++ compiler alone."""
    outputs = {}
    for program, arguments in (("test_layout", []), ("test_blocks", [str(context.seed), "1"])):
        try:
            outputs[program] = build.run([str(build.build_emulation(FOLDER, program)), *arguments], timeout=1800).strip()
        except build.BuildFailed as error:
            raise Failed(str(error)) from error
    return outputs


def compile_kernels(context: Context) -> dict[str, Any]:
    """The library for the device's architecture, or sm_90 where there is none; no kernel may spill."""
    assert context.nvcc
    architecture = context.architecture or "90"
    try:
        context.library, resources = build.build_library(context.nvcc, architecture, FOLDER)
    except build.BuildFailed as error:
        raise Failed(str(error)) from error
    result = {"architecture": architecture, "kernels": [r.as_json() for r in resources]}
    spilled = [r.kernel for r in resources if r.spilled]
    if spilled or not resources:
        raise Failed(f"kernels that spill registers: {spilled}" if spilled else "ptxas named no kernel", result)
    return result


def without_headers(context: Context) -> str | None:
    if context.library is None:
        return without_library(context)
    if os.environ.get("TENSORRT_ROOT") or build.find_headers():
        return None
    return "TensorRT's headers (docs/plugin.md says where to get them; TENSORRT_ROOT=folder that holds include/)"


def compile_plugin(context: Context) -> dict[str, Any]:
    """The plugin library around those kernels, taken as TensorRT takes it up to the point where a GPU is wanted."""
    from gpu import kernel_cases
    from gpu.library import ThroughPlugin

    assert context.nvcc
    try:
        headers = build.find_headers()
        assert headers
        context.plugin, driver = build.build_plugin(context.nvcc, context.architecture or "90", headers, FOLDER)
        context.through_plugin = ThroughPlugin(driver, context.plugin)
    except (build.BuildFailed, OSError, ValueError) as error:
        raise Failed(str(error)) from error
    found = kernel_cases.check_shapes(context.through_plugin, context.seed)
    if found["failures"]:
        raise Failed(f"shapes that the plugin does not take as it should: {found['failures'][0]}", found)
    return {"plugin_sha256": hashlib.sha256(context.plugin.read_bytes()).hexdigest(), "shapes": found}


def call_device(context: Context) -> dict[str, Any]:
    """The first CUDA calls: a launch through the library, then the device's name. Raises NoDevice."""
    import ctypes

    from gpu.library import Args, Kernels

    assert context.library
    context.kernels = Kernels(context.library)
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
    from gpu.library import CudaFailed

    try:
        kernels.launch(args)
    except CudaFailed as error:
        return error
    return None


def without_plugin(context: Context) -> str | None:
    return None if context.through_plugin is not None else "the plugin, which was not built"


def test_plugin(context: Context) -> dict[str, Any]:
    """`enqueue` of the plugin against the fp64 oracle and in a captured graph; no library of TensorRT is wanted."""
    from gpu import kernel_cases

    cases = (case for case in kernel_cases.all_cases() if case.latents in (64, 100))
    return judged({
        "seed": context.seed,
        "oracle": kernel_cases.check(context.through_plugin, cases, context.seed),
        "graph_replay": kernel_cases.check_graph_replay(context.through_plugin, context.seed),
    })  # fmt: skip


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """A result whose parts name no failure. Raises Failed."""
    failures = [failure for part in result.values() if isinstance(part, dict) for failure in part["failures"]]
    if failures:
        raise Failed(f"{len(failures)} cases failed, the first: {failures[0]}", result)
    return result


def test_kernels(context: Context) -> dict[str, Any]:
    """Every case against the fp64 oracle, graph replay, refusals."""
    from gpu import kernel_cases

    return judged({
        "rule": "error against fp64 at most twice torch's in the same dtype, plus one rounding unit",
        "seed": context.seed,
        "oracle": kernel_cases.check(context.kernels, kernel_cases.all_cases(), context.seed),
        "graph_replay": kernel_cases.check_graph_replay(context.kernels, context.seed),
        "refusals": kernel_cases.check_refusals(context.kernels),
    })  # fmt: skip


def without_sanitizer(context: Context) -> str | None:
    if context.library is None:
        return without_library(context)
    return None if find_sanitizer() else "compute-sanitizer (with the CUDA toolkit)"


def find_sanitizer() -> str | None:
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def sanitize(context: Context) -> dict[str, Any]:
    """memcheck, racecheck and synccheck over one case of each kernel and type."""
    sanitizer = find_sanitizer()
    assert sanitizer
    results, failures = {}, []
    script = [sys.executable, str(build.ROOT / "scripts" / "gpu_check"), "--few-cases", str(context.library)]
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=flamingo", *script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
            results[tool] = "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
        except subprocess.TimeoutExpired:
            results[tool] = "not done after 150 s"
        if results[tool] != "clean":
            failures.append(tool)
    if failures:
        raise Failed(f"compute-sanitizer: {', '.join(failures)}: {results[failures[0]][-300:]}", results)
    return results


def benchmark(context: Context) -> dict[str, Any]:
    """Times and ratios. Targets that are not reached are reported, and fail nothing: they belong to the card."""
    sys.path.insert(0, str(build.ROOT / "benchmarks"))
    import phi_attention_gpu

    try:
        result: dict[str, Any] = phi_attention_gpu.measure(context.kernels, context.rounds)
    except MemoryError as error:
        return {"skipped": str(error)}
    return result


def without_modules(*names: str) -> Callable[[Context], str | None]:
    """Says which Python modules are missing."""

    def missing(_: Context) -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return ", ".join(absent) if absent else None

    return missing


PACKAGE = ("msgspec", "onnx_ir", "safetensors", "tokenizers", "typer")  # what flamingo_export itself wants
PLUGIN_VARIABLE = "FLAMINGO_PLUGIN"
WHEELS = "FLAMINGO_WHEELS"
"""Names a folder of installed wheels (pip install --target FOLDER): TensorRT for RTX and cuda-bindings on a machine without network."""


def find_wheels() -> None:
    """Puts the folder of wheels on the path, if one is named."""
    folder = os.environ.get(WHEELS)
    if folder and folder not in sys.path:
        sys.path.append(folder)


def without_rtx(context: Context) -> str | None:
    """The module has another name when only its two wheels are installed. It has no kernels for GPUs of data centers from sm90 on."""
    find_wheels()
    found = next((name for name in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(name)), None)
    if found is None:
        return f"tensorrt_rtx (pip install tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings, or a folder that {WHEELS} names)"
    absent = without_modules(*PACKAGE)(context) or without_cuda_python()
    if absent:
        return absent
    if context.architecture is not None:
        targets = importlib.import_module(found).ComputeCapability
        if not hasattr(targets, f"SM{context.architecture}"):
            return f"kernels for sm_{context.architecture}: TensorRT for RTX has none"
    return None


def without_tensorrt(context: Context) -> str | None:
    find_wheels()
    absent = without_modules("tensorrt", *PACKAGE)(context) or without_cuda_python()
    if absent:
        return absent
    if (
        context.plugin is None
        and PLUGIN_VARIABLE not in os.environ
        and not (build.ROOT / "build" / "libflamingo_plugins.so").exists()
    ):
        return f"the plugin library: build it with TensorRT's headers, or name one with {PLUGIN_VARIABLE}"
    return None


def without_cuda_python() -> str | None:
    try:
        found = importlib.util.find_spec("cuda.bindings.runtime")
    except ImportError:
        found = None
    return None if found else f"cuda-bindings (pip install 'cuda-bindings>=13,<14', or a folder that {WHEELS} names)"


def without_cuda_provider(context: Context) -> str | None:
    absent = without_modules("onnxruntime", *PACKAGE)(context)
    if absent:
        return absent
    import onnxruntime

    present = onnxruntime.get_available_providers()
    return None if "CUDAExecutionProvider" in present else f"onnxruntime-gpu (this onnxruntime has {', '.join(present)})"


PICTURE = build.ROOT / "docs" / "images" / "demo.png"
POLICY = Path(__file__).with_name("fp8_media.toml")


def engines(backend: str, *, quantised: bool = False) -> tuple[tuple[str, ...], ...]:
    """Commands that build engines for this machine's GPU, compare and run them: in fp32 and fp16, the decoder whole and in parts; or in FP8
    (with the plugin the media bank too) and int4."""
    # Ranges are found with PyTorch; without it they are taken for the format's own, which parity knows.
    ranges = () if importlib.util.find_spec("torch") else ("--uncalibrated",)
    settings: dict[str, tuple[str, ...]] = {
        "fp32": ("--precision", "fp32"),
        "fp16": ("--precision", "fp16"),
        "fp16-3": ("--precision", "fp16", "--parts", "3"),
    }
    if quantised:
        settings = {
            "fp8": ("--precision", "fp16", "--fp8", *ranges),
            "fp8-bf16": ("--precision", "bf16", "--fp8", *ranges),
            "int4": ("--precision", "fp16", "--int4"),
        }
        if backend == "tensorrt":
            settings["fp8-media"] = ("--precision", "fp16", "--policy", "POLICY", *ranges)
    commands: list[tuple[str, ...]] = [("doctor", "--json")]
    for name, chosen in settings.items():
        bundle = f"BUNDLE.{name}"
        generate = ("generate", bundle, "--image", "PICTURE", "--backend", backend, "--json")
        commands += [
            ("build", "--size", "nano", *chosen, "--backend", backend, "--parity", "skip", "--out", bundle),
            ("inspect", bundle, "--engine", "decoder"),
            ("parity", bundle, "--backend", backend),
            (*generate, "--beams", "3"),
            (*generate, "--beams", "1"),
            (*generate, "--temperature", "0.8", "--top-p", "0.9", "--seed", "1"),
            ("bench", bundle, "--backend", backend, "--json"),
        ]
    return tuple(commands)


def fp8_against_fp16(backend: str) -> tuple[tuple[str, ...], ...]:
    """Commands that build 3b in fp16 and in FP8, and tell bytes and tokens a second of both. Random weights: their ranges do not matter."""
    commands: list[tuple[str, ...]] = []
    for name, chosen in (("fp16", ()), ("fp8", ("--fp8", "--uncalibrated"))):
        bundle = f"BUNDLE.3b-{name}"
        size = ("--size", "3b", "--precision", "fp16", "--max-length", "2048", "--max-batch", "1")
        commands += [
            ("build", *size, *chosen, "--backend", backend, "--parity", "skip", "--out", bundle),
            ("inspect", bundle, "--engine", "decoder", "--json"),
            ("bench", bundle, "--backend", backend, "--json"),
        ]
    return tuple(commands)


def without_fp8(missing: Callable[[Context], str | None]) -> Callable[[Context], str | None]:
    """Says what `missing` does, or that this GPU has no FP8."""

    def lacks(context: Context) -> str | None:
        absent = missing(context)
        if absent is None and context.architecture is not None and int(context.architecture) < 89:
            return f"FP8: sm_{context.architecture} has none"
        return absent

    return lacks


def run_cli(*commands: Sequence[str]) -> Callable[[Context], dict[str, Any]]:
    """A stage of flamingo-export commands on bundles of the nano model; `BUNDLE` stands for their path, `PICTURE` and `POLICY` for those of
    an image and a policy."""

    def run(context: Context) -> dict[str, Any]:
        results: dict[str, Any] = {}
        own = [str(build.ROOT), str(build.ROOT / "reference"), str(build.ROOT / "calibration")]
        paths = [*own, *filter(None, [os.environ.get(WHEELS)])]
        built = {PLUGIN_VARIABLE: str(context.plugin)} if context.plugin is not None else {}
        environment = built | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with tempfile.TemporaryDirectory() as folder:
            for command in commands:
                words = [
                    word.replace("BUNDLE", f"{folder}/nano.bundle")
                    .replace("PICTURE", str(PICTURE))
                    .replace("POLICY", str(POLICY))
                    for word in command
                ]
                code = "import sys; from flamingo_export.cli import main; sys.exit(main())"
                done = subprocess.run(
                    [sys.executable, "-c", code, *words],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=500,
                    check=False,
                )
                name = f"flamingo-export {' '.join(command)}"
                results[name] = {"exit": done.returncode, "output": (done.stdout or done.stderr)[-4000:]}
                if done.returncode:
                    raise Failed(f"{name}: exit {done.returncode}: {done.stderr[-500:]}", results)
        return results

    return run


STAGES: list[Stage] = [
    Stage("emulation", nothing_missing, emulate),
    Stage("build", without_nvcc, compile_kernels),
    Stage("plugin-build", without_headers, compile_plugin),
    Stage("device", without_library, call_device),
    Stage("kernels", without_library, test_kernels),
    Stage("plugin", without_plugin, test_plugin),
    Stage("benchmark", without_library, benchmark),
    Stage("sanitizer", without_sanitizer, sanitize),
    Stage("tensorrt", without_tensorrt, run_cli(*engines("tensorrt"))),
    Stage("tensorrt-rtx", without_rtx, run_cli(*engines("tensorrt-rtx"))),
    Stage("tensorrt-quantised", without_fp8(without_tensorrt), run_cli(*engines("tensorrt", quantised=True))),
    Stage("tensorrt-rtx-quantised", without_fp8(without_rtx), run_cli(*engines("tensorrt-rtx", quantised=True))),
    Stage("tensorrt-fp8-3b", without_fp8(without_tensorrt), run_cli(*fp8_against_fp16("tensorrt"))),
    Stage("tensorrt-rtx-fp8-3b", without_fp8(without_rtx), run_cli(*fp8_against_fp16("tensorrt-rtx"))),
    Stage("onnxruntime-cuda", without_cuda_provider, run_cli(
        ("build", "--size", "nano", "--parity", "skip", "--out", "BUNDLE"),
        ("bench", "BUNDLE", "--backend", "onnxruntime", "--device", "cuda", "--json"),
    )),
]  # fmt: skip
