"""Every name that the package uses of the datacenter bindings exists in them; they are imported for real, over libraries of nine functions."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import sys
from pathlib import Path

import fake_tensorrt
import pytest
import trt_wheels
from fake_cuda import FakeCuda

from flamingo_export.backends.tensorrt.dtypes import ELEMENT_TYPES
from flamingo_export.backends.tensorrt.engine_loading import stream_reader
from tests.plugin.datacenter_names import RTX_ONLY, RUNTIME_CONFIG, SINCE_11, missing, names

from .conftest import ROOT, run

pytestmark = pytest.mark.tensorrt

MODULE_NAMES = {"trt", "_trt"}
STUBS = {
    "libnvinfer.so": ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
                         "getBuilderPluginRegistry", "getPluginRegistry"),
    "libnvinfer_plugin.so": ("initLibNvInferPlugins",),
    "libnvonnxparser.so": ("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
}  # fmt: skip
CHILD = """
import sys
import tensorrt_bindings as trt
from tests.plugin.datacenter_names import missing
print(trt.__version__, *missing(trt, sys.argv[1:]))
"""
NOTHING = """
import tensorrt_bindings as trt
from flamingo_export.backends.tensorrt.log import BuilderMessages, listening, started
from flamingo_export.errors import BackendError
for kind in (trt.Builder, trt.Runtime):
    with listening(trt, BuilderMessages()) as logger:
        try:
            started(trt, kind, logger, BuilderMessages())
        except BackendError as error:
            print(error)
"""


def names_in_source() -> set[str]:
    """`trt.A.B` of the TensorRT backend and of lowering, as A.B; `self.trt.A` too."""
    files = (ROOT / "flamingo_export" / "backends" / "tensorrt").rglob("*.py")
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
    """Libraries that resolve the symbols of both generations' bindings; what they are asked for they do not give."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    folder = tmp_path_factory.mktemp("stubs")
    for library, functions in ((f"{name}.{major}", functions) for major in (10, 11) for name, functions in STUBS.items()):
        source = folder / f"{library}.c"
        source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in functions))
        done = run("cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source)
        assert done.returncode == 0, done.stderr
    return folder


GENERATIONS = {"datacenter-bindings": "11.", "datacenter-bindings-10.16": "10.16.", "datacenter-bindings-10.15": "10.15."}


def missing_in_datacenter(stubs: Path, wanted: set[str], bindings: str = "datacenter-bindings") -> list[str]:
    paths = os.pathsep.join([str(ROOT), str(trt_wheels.folder(bindings))])
    environment = {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(stubs)}
    done = run(sys.executable, "-c", CHILD, *sorted(wanted), env=environment)
    assert done.returncode == 0, done.stderr
    version, *lacking = done.stdout.split()
    assert version.startswith(GENERATIONS[bindings])
    return lacking


@pytest.mark.slow
@pytest.mark.parametrize("bindings", GENERATIONS)
def test_the_datacenter_bindings_have_every_name(stubs: Path, bindings: str) -> None:
    """Of each generation that is supported; what 11 alone has is asked for before it is used."""
    wanted = (names_in_source() - RTX_ONLY) | set(names()) | SINCE_11
    assert missing_in_datacenter(stubs, wanted, bindings) == ([] if bindings == "datacenter-bindings" else sorted(SINCE_11))


def test_a_library_that_does_not_start_is_told_as_such(stubs: Path) -> None:
    """The stubs give no builder, as TensorRT does where the driver is too old, and the real bindings make of it what they make."""
    paths = os.pathsep.join([str(ROOT), str(trt_wheels.folder("datacenter-bindings"))])
    done = run(sys.executable, "-c", NOTHING, env={**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(stubs)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["TensorRT 11.4.0.106 does not start here: TensorRT gave no reason"] * 2


def test_names_that_are_not_there_are_told(stubs: Path) -> None:
    wanted = {"Builder", "Builder.max_workspace_size", "IInt8Calibrator2", "LayerType.PLUGIN_V3", *RTX_ONLY}
    assert missing_in_datacenter(stubs, wanted) == sorted({"Builder.max_workspace_size", "IInt8Calibrator2", *RTX_ONLY})


def test_the_rtx_bindings_have_every_name() -> None:
    types = {f"DataType.{element.trt}" for element in ELEMENT_TYPES.values()}
    assert missing(trt_wheels.rtx(), sorted(names_in_source() | set(names()) | RTX_ONLY | types | set(RUNTIME_CONFIG))) == ()


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_tensorrt.Engine, "ICudaEngine"),
        (fake_tensorrt.Context, "IExecutionContext"),
        (fake_tensorrt.RuntimeConfig, "IRuntimeConfig"),
        (fake_tensorrt.RuntimeCache, "IRuntimeCache"),
    ],
)
def test_the_fake_has_nothing_that_the_bindings_lack(fake: type, real: str) -> None:
    """Names, and how many arguments a method takes."""
    owner = getattr(trt_wheels.rtx(), real)
    methods = {name: value for name, value in vars(fake).items() if not name.startswith("_") and callable(value)}
    assert methods
    for name, method in methods.items():
        assert hasattr(owner, name), f"{real}.{name}"
        wanted = len(inspect.signature(method).parameters)
        signatures = re.findall(rf"{name}\(self[^)]*\)(?: ->|$)", getattr(owner, name).__doc__, re.MULTILINE)
        assert any(len(re.findall(r"[(, ]\w+: ", signature)) == wanted for signature in signatures), (name, signatures)


def test_the_fakes_enums_are_the_bindings() -> None:
    trt = trt_wheels.rtx()
    for fake in (
        fake_tensorrt.DataType, fake_tensorrt.TensorIOMode, fake_tensorrt.SeekPosition,
        fake_tensorrt.ExecutionContextAllocationStrategy, fake_tensorrt.DynamicShapesKernelSpecializationStrategy,
    ):  # fmt: skip
        assert missing(trt, [f"{fake.__name__}.{member.name}" for member in fake]) == ()


def test_the_reader_is_one_as_the_bindings_want_it(tmp_path: Path) -> None:
    """The real base class cannot be instantiated without a driver, so it is compared with how its documentation says it is derived."""
    (tmp_path / "x").write_bytes(b"0123456789")
    fake = fake_tensorrt.FakeTensorRT(FakeCuda())
    with (tmp_path / "x").open("rb") as file:
        reader = stream_reader(fake, file)
        assert reader.seek(-3, fake.SeekPosition.END)
        assert reader.read(10, 0) == b"789"
        assert not reader.seek(-3, fake.SeekPosition.SET)
        told = trt_wheels.rtx().IStreamReaderV2.__doc__
        for method, result in (("read", "bytes"), ("seek", "bool")):
            names = list(inspect.signature(getattr(type(reader), method)).parameters)
            assert re.search(rf"def {method}\({names[0]}, {names[1]}: int, {names[2]}: \w+\) -> {result}:", told)
