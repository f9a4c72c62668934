"""Every name that the package uses of the datacenter bindings exists in them; they are imported for real, over libraries of nine functions."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
import trt_wheels

from flamingo_export.backends.tensorrt.datacenter_names import RTX_ONLY, missing, names

from .conftest import ROOT, run

pytestmark = pytest.mark.tensorrt

MODULE_NAMES = {"trt", "_trt"}
STUBS = {
    "libnvinfer.so.11": ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
                         "getBuilderPluginRegistry", "getPluginRegistry"),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": ("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
}  # fmt: skip
CHILD = """
import sys
import tensorrt_bindings as trt
from flamingo_export.backends.tensorrt.datacenter_names import missing
print(trt.__version__, *missing(trt, sys.argv[1:]))
"""


def names_in_source() -> set[str]:
    """`trt.A.B` of the TensorRT backend and of lowering, as A.B; `self.trt.A` too."""
    files = [
        *(ROOT / "flamingo_export" / "backends" / "tensorrt").glob("*.py"),
        *(ROOT / "flamingo_export" / "lowering").glob("*.py"),
    ]
    return {name for file in files for name in chains(ast.parse(file.read_text()))}


def chains(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute) and inner.attr not in MODULE_NAMES:
            parts.append(inner.attr)
            inner = inner.value
        owner = inner.attr if isinstance(inner, ast.Attribute) else inner.id if isinstance(inner, ast.Name) else ""
        if parts and owner in MODULE_NAMES:
            found.add(".".join(reversed(parts)))
    return found - {"__name__", "__version__"}


def test_chains_of_names_are_found() -> None:
    tree = ast.parse(
        "trt.Builder(log).create_network(0); x = self.trt.LayerType.PLUGIN_V3; other.trt2.Q; isinstance(a, _trt.ILayer)"
    )
    assert chains(tree) == {"Builder", "LayerType", "LayerType.PLUGIN_V3", "ILayer"}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries that resolve the bindings' symbols; none of the functions is called."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    folder = tmp_path_factory.mktemp("stubs")
    for library, functions in STUBS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in functions))
        done = run("cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source)
        assert done.returncode == 0, done.stderr
    return folder


def missing_in_datacenter(stubs: Path, wanted: set[str]) -> list[str]:
    paths = os.pathsep.join([str(ROOT), str(trt_wheels.folder("datacenter-bindings"))])
    environment = {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(stubs)}
    done = run(sys.executable, "-c", CHILD, *sorted(wanted), env=environment)
    assert done.returncode == 0, done.stderr
    version, *lacking = done.stdout.split()
    assert version.startswith("11.")
    return lacking


def test_the_datacenter_bindings_have_every_name(stubs: Path) -> None:
    assert missing_in_datacenter(stubs, (names_in_source() - RTX_ONLY) | set(names())) == []


def test_names_that_are_not_there_are_told(stubs: Path) -> None:
    wanted = {"Builder", "Builder.max_workspace_size", "IInt8Calibrator2", "LayerType.PLUGIN_V3", *RTX_ONLY}
    assert missing_in_datacenter(stubs, wanted) == sorted({"Builder.max_workspace_size", "IInt8Calibrator2", *RTX_ONLY})


def test_the_rtx_bindings_have_every_name() -> None:
    assert missing(trt_wheels.rtx(), sorted(names_in_source() | set(names()) | RTX_ONLY)) == ()
