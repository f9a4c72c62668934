"""Which TensorRT headers CMake finds, in which order, and which versions the plugin accepts. Needs no TensorRT: the headers are made here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from .conftest import ROOT, run

PLUGINS = ROOT / "trt_plugins" / "plugins"


def headers(root: Path, version: str) -> Path:
    """A folder with include/, as the tar and the public repository have it."""
    include = root / "include"
    include.mkdir(parents=True)
    (include / "NvInferRuntime.h").write_text("// made by a test\n")
    major, minor = version.split(".")
    lines = [f"#define TRT_MAJOR_ENTERPRISE {major}", f"#define TRT_MINOR_ENTERPRISE {minor}"]
    lines += ["#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE", "#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE"]
    (include / "NvInferVersion.h").write_text("\n".join(lines) + "\n")
    return root


def find(tmp_path: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of a project that only looks for the headers."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    source = tmp_path / "project"
    source.mkdir()
    text = f'cmake_minimum_required(VERSION 3.21)\nproject(p LANGUAGES NONE)\ninclude("{PLUGINS}/TensorRTHeaders.cmake")\n'
    text += 'message(STATUS "found=${FLAMINGO_TENSORRT_INCLUDE} version=${FLAMINGO_TENSORRT_VERSION}")\n'
    (source / "CMakeLists.txt").write_text(text)
    clean = {name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"}
    done = run("cmake", "-S", source, "-B", tmp_path / "build", *options, env={**clean, **(environment or {})})
    return done.returncode, done.stdout + done.stderr


def found(output: str) -> tuple[str, str]:
    line = next(line for line in output.splitlines() if "found=" in line)
    include, version = line.partition("found=")[2].split(" version=")
    return include.rstrip("/"), version


def test_the_option_goes_before_the_environment(tmp_path: Path) -> None:
    option, variable = headers(tmp_path / "option", "11.1"), headers(tmp_path / "variable", "10.3")
    code, output = find(tmp_path, f"-DTENSORRT_ROOT={option}", environment={"TENSORRT_ROOT": str(variable)})
    assert code == 0, output
    assert found(output) == (str(option / "include"), "11.1")


def test_the_environment_goes_before_system_paths(tmp_path: Path) -> None:
    variable, system = headers(tmp_path / "variable", "10.3"), headers(tmp_path / "system", "11.1")
    code, output = find(tmp_path, f"-DCMAKE_PREFIX_PATH={system}", environment={"TENSORRT_ROOT": str(variable)})
    assert code == 0, output
    assert found(output) == (str(variable / "include"), "10.3")


def test_a_relative_folder_is_where_the_command_was_given(tmp_path: Path) -> None:
    """Not below the sources, nor below the build folder."""
    variable = headers(tmp_path / "variable", "11.1")
    code, output = find(tmp_path, environment={"TENSORRT_ROOT": "variable", "PWD": str(tmp_path)})
    assert code == 0, output
    assert found(output) == (str(variable / "include"), "11.1")


def test_system_paths_go_before_the_vendors_package(tmp_path: Path) -> None:
    system = headers(tmp_path / "system", "11.1")
    code, output = find(tmp_path, f"-DCMAKE_PREFIX_PATH={system}", f"-DTensorRT_DIR={vendor(tmp_path)}")
    assert code == 0, output
    assert found(output) == (str(system / "include"), "11.1")


def test_the_vendors_package(tmp_path: Path) -> None:
    skip_where_installed()
    code, output = find(tmp_path, f"-DTensorRT_DIR={vendor(tmp_path)}")
    assert code == 0, output
    assert found(output) == (str(tmp_path / "vendor" / "include"), "11.0")


def test_without_headers_it_says_how_to_get_them(tmp_path: Path) -> None:
    skip_where_installed()
    code, output = find(tmp_path)
    assert code == 0, output
    assert found(output) == ("", "")
    for hint in ("libnvinfer-headers-dev", "-DTENSORRT_ROOT=", "NVIDIA/TensorRT"):
        assert hint in output


def test_a_root_without_headers_is_an_error(tmp_path: Path) -> None:
    code, output = find(tmp_path, f"-DTENSORRT_ROOT={tmp_path}")
    assert code != 0
    assert "has no include/NvInferRuntime.h" in " ".join(output.split())  # CMake breaks lines


@pytest.mark.parametrize(
    ("version", "accepted"), [("1.7", False), ("8.6", False), ("9.3", False), ("10.0", True), ("11.1", True), ("12.0", False)]
)
def test_versions(version: str, accepted: bool, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    include = headers(tmp_path / "root", version) / "include"
    done = run("c++", "-fsyntax-only", "-x", "c++", "-I", include, PLUGINS / "version_check.h")
    assert (done.returncode == 0) is accepted, done.stderr
    if not accepted:
        assert "headers of TensorRT 10 or 11" in done.stderr


def vendor(tmp_path: Path) -> Path:
    """A CMake package as a vendor installs it."""
    root = headers(tmp_path / "vendor", "11.0")
    package = root / "lib" / "cmake" / "TensorRT"
    package.mkdir(parents=True)
    target = "add_library(TensorRT::nvinfer SHARED IMPORTED)\n"
    target += f'set_target_properties(TensorRT::nvinfer PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "{root}/include")\n'
    (package / "TensorRTConfig.cmake").write_text(target)
    return package


def skip_where_installed() -> None:
    for folder in (
        "/usr/include",
        "/usr/include/x86_64-linux-gnu",
        "/usr/local/include",
        "/usr/local/tensorrt/include",
        "/opt/tensorrt/include",
    ):
        if (Path(folder) / "NvInferRuntime.h").exists():
            pytest.skip(f"this machine has TensorRT's headers in {folder}")
