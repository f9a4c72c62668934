"""Stages that build and run engines by the package's own command line: whichever engines are installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpu import kernel_build, wheels
from gpu.stage import Context, Failed, NoDevice, NoTime, Result


def without_modules(*names: str) -> Callable[[Context], str | None]:
    """Says which Python modules are missing."""

    def missing(_: Context) -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return ", ".join(absent) if absent else None

    return missing


PACKAGE = ("msgspec", "onnx_ir", "safetensors", "tokenizers", "typer")  # what flamingo_export itself wants
PLUGIN_VARIABLE = "FLAMINGO_PLUGIN"
ONNXRUNTIME = "onnxruntime"
"""Folder of the wheels of ONNX Runtime with CUDA, below that of the others: only its stage has them, before any other ONNX Runtime."""
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
        and not (kernel_build.ROOT / "build" / "libflamingo_plugins.so").exists()
    ):
        return f"the plugin library: build it with TensorRT's headers, or name one with {PLUGIN_VARIABLE}"
    return None


def without_cuda_python() -> str | None:
    try:
        found = importlib.util.find_spec("cuda.bindings.runtime")
    except ImportError:
        found = None
    return (
        None
        if found
        else f"cuda-bindings (pip install 'cuda-bindings>=13,<14', of CUDA 12 '>=12.9,<13', or a folder that {WHEELS} names)"
    )


def without_cuda_provider(context: Context) -> str | None:
    """ONNX Runtime with CUDA: installed, or taken along in pieces."""
    absent = without_modules(*PACKAGE)(context)
    if absent:
        return absent
    if list((wheels.FOLDER / ONNXRUNTIME).glob("onnxruntime_gpu-*")):
        _, missing = wheels.join(wheels.FOLDER / ONNXRUNTIME)
        return f"pieces of ONNX Runtime's wheel: {', '.join(missing)}" if missing else None
    advice = "make gpu-wheels GPU_WHEELS_ARGS=--onnxruntime-gpu gathers it in pieces"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime-gpu ({advice})"
    import onnxruntime

    present = onnxruntime.get_available_providers()
    return (
        None if "CUDAExecutionProvider" in present else f"onnxruntime-gpu (this onnxruntime has {', '.join(present)}; {advice})"
    )


PICTURE = kernel_build.ROOT / "docs" / "images" / "demo.png"
POLICY = Path(__file__).with_name("fp8_media.toml")


def engines(backend: str, *, quantised: bool = False) -> tuple[tuple[str, ...], ...]:
    """Commands that build engines for this machine's GPU, compare and run them: in fp32 and fp16, the decoder whole and in parts; or in FP8
    (with the plugin the media bank too) and int4."""
    # Ranges are found with PyTorch; without it they are taken for the format's own, which parity knows.
    ranges = () if importlib.util.find_spec("torch") else ("--uncalibrated",)
    settings: dict[str, tuple[str, ...]] = {
        "fp32": ("--storage", "fp32"),
        "fp16": ("--storage", "fp16"),
        "fp16-3": ("--storage", "fp16", "--parts", "3"),
    }
    if quantised:
        settings = {
            "fp8": ("--storage", "fp16", "--fp8", *ranges),
            "fp8-bf16": ("--storage", "bf16", "--fp8", *ranges),
            "int4": ("--storage", "fp16", "--int4"),
        }
        if backend == "tensorrt":
            settings["fp8-media"] = ("--storage", "fp16", "--policy", "POLICY", *ranges)
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
    """Commands that build 3b in fp16 and in FP8, and tell bytes and tokens per second of both. Random weights: their ranges do not matter."""
    commands: list[tuple[str, ...]] = []
    for name, chosen in (("fp16", ()), ("fp8", ("--fp8", "--uncalibrated"))):
        bundle = f"BUNDLE.3b-{name}"
        size = ("--size", "3b", "--storage", "fp16", "--max-length", "2048", "--max-batch", "1")
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


def run_cli(*commands: Sequence[str]) -> Callable[[Context], Result]:
    """A stage of flamingo-export commands on bundles of the nano model; `BUNDLE` stands for their path, `PICTURE` and `POLICY` for those of
    an image and a policy."""

    def run(context: Context) -> Result:
        results: Result = {}
        failures: list[str] = []
        lost: set[str] = set()
        with tempfile.TemporaryDirectory() as folder:
            for command in commands:
                bundles = {word for word in command if word.startswith("BUNDLE")}
                if bundles & lost:
                    continue  # there is none
                name = f"flamingo-export {' '.join(command)}"
                done = _cli(context, _filled_in(command, folder))
                results[name] = {"exit": done.returncode, "output": (done.stdout or done.stderr)[-4000:]}
                if done.returncode:
                    failures.append(f"{name}: exit {done.returncode}: {done.stderr[-500:]}")
                    lost |= bundles if command[0] == "build" else set()
        if failures:
            raise Failed(f"{len(failures)} of {len(results)} commands failed, the first: {failures[0]}", results)
        return results

    return run


def rehearse_cli(*commands: Sequence[str]) -> Callable[[Context], Result]:
    """In a dry run: the plans of the same builds, by the same command line; the builds themselves want the library or the GPU."""

    def rehearse(context: Context) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            for command in (command for command in commands if command[0] == "build"):
                done = _cli(context, [*_filled_in(command, folder), "--plan", "--json"])
                try:
                    json.loads(done.stdout)  # with exit code 1 where it is this machine that has too little for such a build
                except ValueError as error:
                    raise Failed(
                        f"flamingo-export {' '.join(command)} --plan: exit {done.returncode}: {done.stderr[-500:]}"
                    ) from error
        raise NoDevice("the builds are planned; the engines want TensorRT and a GPU")

    return rehearse


def run_onnxruntime(context: Context) -> Result:
    """nano and 3b's decoder (its language model has 1.3B parameters) on ONNX Runtime's CUDA provider beside PyTorch, in fp16; and nano whole, by
    the package's own commands."""
    return _onnxruntime(context, "CUDAExecutionProvider", {"nano": ((512,), (1, 8)), "3b": ((512, 2048), (1, 8, 32))})


def rehearse_onnxruntime(context: Context) -> Result:
    """In a dry run: the same script on the CPU provider, with nano."""
    _onnxruntime(context, "CPUExecutionProvider", {"nano": ((64,), (1, 2))}, steps=2)
    raise NoDevice("nano's steps are the same on ONNX Runtime's CPU provider and in PyTorch; the CUDA provider wants a GPU")


def _onnxruntime(
    context: Context, provider: str, sizes: Mapping[str, tuple[Sequence[int], Sequence[int]]], steps: int = 30
) -> Result:
    from gpu import onnxruntime_cuda

    site: list[str] = []
    found = list((wheels.FOLDER / ONNXRUNTIME).glob("*.whl"))
    if provider != "CPUExecutionProvider" and found:
        site = [str(wheels.unpack(found, wheels.UNPACKED.with_name(ONNXRUNTIME)))]
    results: Result = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, (lengths, batches) in sizes.items():
            bundle = f"{folder}/{size}.bundle"
            made = _cli(context, ["build", "--size", size, "--storage", "fp16", "--parity", "skip", "--out", bundle])
            if made.returncode:
                raise Failed(f"build --size {size}: exit {made.returncode}: {made.stderr[-500:]}", results)
            words = [bundle, "--provider", provider, "--steps", str(steps)]
            words += ["--lengths", *map(str, lengths), "--batches", *map(str, batches)]
            code = f"import runpy; runpy.run_path({onnxruntime_cuda.__file__!r}, run_name='__main__')"
            done = _python(context, code, words, before=site)
            if done.returncode:
                raise Failed(f"ONNX Runtime with {size}: exit {done.returncode}: {done.stderr[-1000:]}", results)
            results[size] = json.loads(done.stdout.splitlines()[-1])
            faults = onnxruntime_cuda.failures(results[size])
            if provider != "CPUExecutionProvider" and size == "nano":
                commands = results["commands"] = _on_the_gpu(context, bundle, site)
                faults += [f"{name}: {found['output'][-500:]}" for name, found in commands.items() if found["exit"]]
            if faults:
                raise Failed("; ".join(faults), results)
    return results


def _on_the_gpu(context: Context, bundle: str, site: Sequence[str]) -> Result:
    """Parity and an answer of the package's own backend. site: where ONNX Runtime with CUDA is."""
    where = ["--backend", "onnxruntime", "--device", "cuda"]
    results: Result = {}
    for words in (["parity", bundle, *where], ["generate", bundle, "--image", str(PICTURE), *where, "--json"]):
        done = _python(context, "from flamingo_export.cli import main; sys.exit(main())", words, before=site)
        output = done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"
        results[f"flamingo-export {words[0]} {' '.join(where)}"] = {"exit": done.returncode, "output": output[-4000:]}
    return results


def _filled_in(command: Sequence[str], folder: str) -> list[str]:
    names = {"BUNDLE": f"{folder}/nano.bundle", "PICTURE": str(PICTURE), "POLICY": str(POLICY)}
    words = list(command)
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    return words


def _cli(context: Context, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """flamingo-export in a process of its own."""
    return _python(context, "from flamingo_export.cli import main; sys.exit(main())", words)


def _python(context: Context, code: str, words: Sequence[str], before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with what this one found: the plugin, the wheels. before: folders that come first. Raises NoTime."""
    own = [str(kernel_build.ROOT), str(kernel_build.ROOT / "reference"), str(kernel_build.ROOT / "calibration")]
    paths = [*before, *own, *filter(None, [os.environ.get(WHEELS)])]
    built = {PLUGIN_VARIABLE: str(context.plugin)} if context.plugin is not None else {}
    environment = built | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    behind = [str(context.wheels)] if context.wheels is not None else []
    try:
        return subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path += {behind!r}; {code}", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=min(500.0, context.seconds),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        if context.seconds > 500:
            raise Failed(f"{' '.join(words)}: not done after 500 s") from error
        raise NoTime(f"{' '.join(words)} was not done when the time was up") from error
