"""Builds the kernels with only nvcc, one architecture, and reads what the compiler says of registers and spills."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "trt_plugins" / "kernels"
EMULATION = ROOT / "trt_plugins" / "tests" / "kernels"
PLUGIN = ROOT / "trt_plugins" / "plugins"
DRIVER = ROOT / "trt_plugins" / "tests" / "plugin" / "through_plugin.cpp"
HEADER = "NvInferRuntime.h"
ALL_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class BuildFailed(Exception):
    """A compiler refused; the message has its command and its words."""


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel for one architecture. Bytes, but for registers (of a thread)."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_nvcc() -> str | None:
    """nvcc on PATH, under CUDA_HOME or in its usual place."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{folder}/bin") for folder in folders if folder)]
    return next((place for place in places if place), None)


def nvcc_version(nvcc: str) -> str:
    """As `13.0.88`."""
    found = re.search(r"V(\d+\.\d+\.\d+)", run([nvcc, "--version"]))
    return found[1] if found else "unknown"


def run(command: list[str], *, timeout: float = 600, folder: Path | None = None) -> str:
    """Output of a command, run in `folder`. Raises BuildFailed with the output when it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{' '.join(command)}: not done after {timeout:.0f} s") from error
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def digest_of_sources() -> str:
    """SHA-256 over the kernels' sources without their comments and spaces, by which a result belongs to them."""
    digest = hashlib.sha256()
    for path in sorted(p for p in KERNELS.iterdir() if p.suffix in (".h", ".cuh", ".cu")):
        code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        digest.update(path.name.encode() + b"\0" + " ".join(code.split()).encode() + b"\0")
    return digest.hexdigest()


def _key(nvcc: str, architecture: str) -> str:
    """By which compiled kernels are distinguished from those of other sources, compilers and machines."""
    parts = f"{digest_of_sources()} {nvcc_version(nvcc)} {platform.machine()}"
    return f"{architecture}.{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def kernel_objects(nvcc: str, architecture: str, folder: Path) -> dict[Path, Path]:
    """Source -> where its object file is, once build_library has made it."""
    return {source: folder / f"{source.stem}.{_key(nvcc, architecture)}.o" for source in sorted(KERNELS.glob("*.cu"))}


def build_library(nvcc: str, architecture: str, folder: Path) -> tuple[Path, list[Resources]]:
    """libflamingo_kernels.so for one architecture ("90") and what each kernel takes. Sources compile side by side; those of a library that is
    there already, from the same sources and compiler, do not."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = kernel_objects(nvcc, architecture, folder)
    library = folder / f"libflamingo_kernels.{_key(nvcc, architecture)}.so"
    known = library.with_suffix(".json")
    if all(path.exists() for path in (library, known, *wanted.values())):
        return library, [Resources(**found) for found in json.loads(known.read_text())]
    resources: list[Resources] = []

    def compile_one(source: Path) -> tuple[Path, list[Resources]]:
        out = wanted[source]
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        options = ["-std=c++17", "-O3", code, "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
        log = run([nvcc, *options, "-c", str(source), "-o", str(out)], timeout=3600)
        return out, parse_resources(log)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = []
        for out, found in pool.map(compile_one, wanted):
            objects.append(str(out))
            resources += found
    # nvcc hands the linker's words on without quotes, and the path of this checkout may hold spaces.
    script = "-Xlinker=--version-script=exports.map"
    run([nvcc, "-shared", f"-arch=sm_{architecture}", *objects, "-o", str(library), script], folder=KERNELS)
    known.write_text(json.dumps([found.as_json() for found in resources]))
    return library, resources


def find_headers() -> Path | None:
    """TensorRT's headers: of the variable TENSORRT_ROOT, or in their usual places. Raises BuildFailed where the variable names none."""
    root = os.environ.get("TENSORRT_ROOT")
    if root:
        include = Path(root).resolve() / "include"  # compilers run in other folders
        if not (include / HEADER).is_file():
            raise BuildFailed(f"TENSORRT_ROOT is {root}, which has no include/{HEADER}")
        return include
    system = ["/usr/include", f"/usr/include/{platform.machine()}-linux-gnu", "/usr/local/include"]
    places = [*system, "/usr/local/tensorrt/include", "/opt/tensorrt/include"]
    return next((Path(place) for place in places if (Path(place) / HEADER).is_file()), None)


def build_plugin(nvcc: str, architecture: str, headers: Path, folder: Path) -> tuple[Path, Path]:
    """The plugin library around the kernels that build_library has compiled, and the library that calls it as TensorRT does."""
    plugin, driver = folder / "libflamingo_plugins.so", folder / "libflamingo_through_plugin.so"
    common = [nvcc, "-shared", "-std=c++17", "-O2", f"-arch=sm_{architecture}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    common += ["-isystem", str(headers), "-I", str(KERNELS)]
    objects = [str(out) for out in kernel_objects(nvcc, architecture, folder).values()]
    sources = [str(path) for path in sorted(PLUGIN.glob("*.cpp"))]
    script = ["-Xlinker=--no-undefined", "-Xlinker=--version-script=exports.map"]
    run([*common, *sources, *objects, "-o", str(plugin), *script], folder=PLUGIN)
    run([*common, "-Xcompiler", "-fvisibility=default", str(DRIVER), "-o", str(driver), "-ldl"])
    return plugin, driver


def resources_of(nvcc: str, source: Path, architecture: str, out: str) -> list[Resources]:
    """What each kernel of a source takes on an architecture; `out` is the file for its machine code."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return parse_resources(
        run([nvcc, "-std=c++17", "-O3", code, "-Xptxas", "-v", "-cubin", str(source), "-o", out], timeout=7200)
    )


def parse_resources(log: str) -> list[Resources]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    found = []
    pattern = r"entry function '(\S+)' for 'sm_(\d+)a?'\n(.*?)(?=ptxas info\s+: Compiling|\Z)"
    for name, architecture, text in re.findall(pattern, log, flags=re.DOTALL):

        def number(expression: str, text: str = text) -> int:
            match = re.search(expression, text)
            return int(match[1]) if match else 0

        found.append(
            Resources(
                kernel=readable(name),
                architecture=architecture,
                registers=number(r"Used (\d+) registers"),
                shared=number(r"(\d+) bytes smem"),
                stack=number(r"(\d+) bytes stack frame"),
                spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    return found


def readable(name: str) -> str:
    """`prefill bf16, fp8, 128` of a mangled kernel name."""
    words = {"4Half": "fp16", "6Bfloat": "bf16", "4E4m3": "fp8", "6Single": "fp32"}
    ranges = "range_" if re.search(r"\d+range_(kernel|fp32)", name) else ""
    shape = re.search(r"MmaShapeINS_(4Half|6Bfloat)E(?:S2_|NS_4E4m3E)Li(\d+)ELi(\d)ELb(\d)E", name)
    if shape:
        sliced = "prefill" if ranges else "prefill_sliced"
        kind = ranges + ("decode" if shape[3] == "1" else "prefill" if shape[4] == "1" else sliced)
        kv = "fp8" if "4E4m3" in name else words[shape[1]]
        return f"{kind} {words[shape[1]]}, {kv}, {shape[2]}"
    joined = re.search(r"join_kernelINS_(4Half|6Bfloat)E(?:S1_|NS_4E4m3E)", name)
    if joined:
        return f"range_join {words[joined[1]]}, {'fp8' if '4E4m3' in name else words[joined[1]]}, any"
    single = re.search(r"fp32_kernelINS_(\w+?)E", name)
    return f"{ranges}fp32 fp32, {words.get(single[1], single[1])}, any" if single else name


def build_emulation(folder: Path, program: str, *, kernels: Path = KERNELS, flags: Sequence[str] = ("-O1",)) -> Path:
    """The kernels' code for the CPU with the host's C++ compiler: `test_blocks`, `test_range` or `test_layout`."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed("no C++ compiler: install g++")
    out = folder / program
    options = ["-std=c++17", *flags, "-Wall", "-Wextra", "-I", str(EMULATION / "without_cuda"), "-I", str(kernels)]
    run([compiler, *options, str(EMULATION / f"{program}.cpp"), "-o", str(out)], timeout=1800)
    return out


def build_emulated_library(folder: Path) -> Path:
    """The kernels' C interface, of head size 32, each launch run by the emulator: for tests of what drives the kernels."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed("no C++ compiler: install g++")
    out = folder / "libflamingo_kernels.emulated.so"
    include = ["-I", str(EMULATION / "without_cuda"), "-I", str(KERNELS)]
    run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", *include, str(EMULATION / "emulated_kernels.cpp"), "-o", str(out)])
    return out


def find_compiler() -> str | None:
    """A C++ compiler of the host."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
