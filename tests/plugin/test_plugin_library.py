"""The plugin library without a GPU: driven from C++, in lean TensorRT's registry, and by the parser and builder of TensorRT for RTX."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import onnx
import pytest
import trt_wheels

from flamingo_export.backends.tensorrt.plugin import digest, find_plugin

from .conftest import in_child, run

pytestmark = pytest.mark.tensorrt


def test_driven_from_cpp(plugin_build: Path, library: Path) -> None:
    done = run(plugin_build / "test_plugin", library)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = re.fullmatch(r"(\d+) passed, 0 failed", done.stdout.splitlines()[-1])
    assert summary, done.stdout
    assert int(summary[1]) > 300


@pytest.mark.parametrize("which", ["recording launcher", "kernels"])
def test_two_symbols_out_and_none_of_tensorrt_in(which: str, request: pytest.FixtureRequest) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    if which == "kernels":
        path = find_plugin()
        if path is None:
            pytest.skip("no plugin with kernels was built in this checkout")
        launcher = set()
    else:
        path = request.getfixturevalue("library")
        ranges = "flamingo_phi_range_cross_attention"
        launcher = {"flamingo_phi_cross_attention", "flamingo_phi_cross_attention_kernel"}
        launcher |= {ranges, f"{ranges}_kernel", f"{ranges}_workspace"}
    defined = run("nm", "-D", "--defined-only", path).stdout.split("\n")
    assert {line.split()[-1] for line in defined if line} == {"getCreators", "setLoggerFinder"}
    wanted = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).stdout.split("\n") if line}
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+|__gmon_start__|__cxa_finalize")
    assert {name for name in wanted if not system.fullmatch(name)} == launcher


def test_lean_registry_creates_it(library: Path) -> None:
    trt_wheels.folder("lean")
    found = in_child("lean_registry.py", library)
    assert not found["before"]
    assert found["digests"] == [digest(library)] * 2
    assert found["creators"] == [["PhiCrossAttention", "1", "flamingo"]]
    assert found["fields"] == [["scale", "FLOAT32"], ["kv_scales", "INT32"]]
    assert found["created"] == {
        "no attributes": True, "scale": True, "fp8": True, "from an engine": True, "negative scale": False, "unknown": False,
    }  # fmt: skip
    kinds = {case: kind for case, (kind, _) in found["errors"].items()}
    assert kinds == {"another library": "IncompatibleEngine", "another digest": "IncompatibleEngine", "no file": "BackendError"}
    assert "cannot be read" in found["errors"]["no file"][1]
    assert "start another one" in found["errors"]["another library"][1]


@pytest.mark.parametrize(("case", "dtype"), [("fp32", "FLOAT"), ("fp16", "HALF"), ("bf16", "BF16"), ("fp8", "HALF")])
def test_rtx_compiles_a_call(case: str, dtype: str, library: Path, rtx_path: dict[str, str]) -> None:
    found = in_child("rtx_parser.py", library, case, environment=rtx_path)
    assert found["parsed"], found["errors"]
    assert found["layers"] == {"PLUGIN_V3": 1}
    assert found["y"] == [dtype, [-1, -1, 3, 64]]
    assert found["bytes"] > 0, found["errors"]
    assert not [line for line in found["errors"] if "CUDA driver version is insufficient" not in line]


@pytest.mark.parametrize(
    ("case", "parsed", "why"),
    [
        ("fp8 without the attribute", False, "7 inputs and 1 outputs, expected 5 and 1 (kv_scales=0)"),
        ("negative scale", False, "field scale is positive, found -0.5"),
        ("head size 72", True, "no kernel for head size 72"),
    ],
)
def test_rtx_refuses_with_the_reason(case: str, parsed: bool, why: str, library: Path, rtx_path: dict[str, str]) -> None:
    found = in_child("rtx_parser.py", library, case, environment=rtx_path)
    assert found["parsed"] is parsed
    assert not found.get("bytes")
    assert any(f"flamingo::PhiCrossAttention: {why}" in line for line in found["errors"]), found["errors"]


@pytest.mark.parametrize("media", ["storage", "fp8"])
def test_rtx_gives_every_gated_layer_of_nano_to_the_plugin(
    media: str, library: Path, rtx_path: dict[str, str], tmp_path: Path
) -> None:
    """With the bank in FP8 its codes and scales are inputs of the plugin's layer; FP8 may be read by nothing else."""
    bundle, policy = tmp_path / "nano.bundle", tmp_path / "policy.toml"
    policy.write_text(f'media = "{media}"\n')
    quantised = ["--policy", policy, "--uncalibrated"] if media == "fp8" else []  # a policy that quantises nothing is refused
    program = [sys.executable, "-c", "import sys; from flamingo_export.cli import main; sys.exit(main())"]
    done = run(*program, "build", "--size", "nano", "--out", bundle, "--parity", "skip", *quantised)
    assert done.returncode == 0, done.stderr
    graph = bundle / "decoder.onnx"
    _static_capacity(graph, 64)
    found = in_child("rtx_parser.py", library, "decoder", graph, environment=rtx_path)
    assert found["parsed"], found["errors"]
    # Six layers, of which 0, 2 and 4 are gated; K and V of each are updated in place.
    assert found["layers"]["PLUGIN_V3"] == 3
    assert found["layers"]["KV_CACHE_UPDATE"] == 12


def _static_capacity(path: Path, capacity: int) -> None:
    """Names the cache's length, which TensorRT wants to know; the weights stay in their files."""
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "C":
                size.dim_value = capacity
    onnx.save(model, path)
