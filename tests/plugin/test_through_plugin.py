"""What scripts/gpu_check calls the plugin through, on the launcher that records its arguments: nothing gets lost on the way."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from gpu import kernel_cases, range_cases
from gpu.kernel_library import Args, CudaFailed, ThroughPlugin, arguments
from gpu.range_cases import RangeArgs, RangeKernels

pytestmark = pytest.mark.tensorrt


class Recorded(ctypes.Structure):
    """FakeLauncher of trt_plugins/tests/plugin/fake_launcher.h."""

    _fields_ = (
        ("args", Args), ("stream", ctypes.c_void_p), ("calls", ctypes.c_int), ("answer", ctypes.c_int),
        ("range_args", RangeArgs), ("range_calls", ctypes.c_int),
    )  # fmt: skip


@pytest.fixture
def through(plugin_build: Path, library: Path) -> ThroughPlugin:
    return ThroughPlugin(plugin_build / "libthrough_plugin.so", library)


@pytest.fixture
def recorded(plugin_build: Path, through: ThroughPlugin) -> Recorded:
    launcher = ctypes.CDLL(str(plugin_build / "libfake_launcher.so")).fake_launcher
    launcher.restype = ctypes.POINTER(Recorded)
    held: Recorded = launcher().contents
    held.calls = held.range_calls = held.answer = 0
    return held


@pytest.fixture
def ranges_through(plugin_build: Path, through: ThroughPlugin) -> RangeKernels:
    """The ranges' plugin of the library that `through` has loaded."""
    return RangeKernels(plugin_build / "libthrough_plugin.so")


def made(dtype: torch.dtype, kv_dtype: torch.dtype, layout: str = "ragged") -> tuple[kernel_cases.Inputs, torch.Tensor]:
    case = kernel_cases.Case(layout, dtype, kv_dtype, 64, 16)
    inputs = kernel_cases.make(case, torch.Generator().manual_seed(0), device="cpu")
    return inputs, torch.empty_like(inputs.q)


@pytest.mark.parametrize("layout", kernel_cases.LAYOUTS)
def test_arguments_arrive_as_they_were_given(through: ThroughPlugin, recorded: Recorded, layout: str) -> None:
    for (dtype, kv_dtype), scale in itertools.product(kernel_cases.TYPES, (None, 0.25)):
        inputs, y = made(dtype, kv_dtype, layout)
        given = arguments(
            inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, y,
            k_scale=inputs.k_scale, v_scale=inputs.v_scale, scale=scale,
        )  # fmt: skip
        before = recorded.calls
        through.launch(given, stream=1234)
        assert recorded.calls == before + 1
        assert recorded.stream == 1234
        for name in [field[0] for field in Args._fields_]:
            assert getattr(recorded.args, name) == getattr(given, name), (name, dtype, kv_dtype)


def test_shapes_are_judged_without_a_launch(through: ThroughPlugin, recorded: Recorded) -> None:
    found = kernel_cases.check_shapes(through, seed=0)
    assert found == {"cases": 36, "failures": []}
    assert recorded.calls == 0


def test_an_error_of_the_launch_comes_back(through: ThroughPlugin, recorded: Recorded) -> None:
    inputs, y = made(torch.float16, torch.float16)
    recorded.answer = 700
    with pytest.raises(CudaFailed, match="cudaError 700"):
        through.launch(arguments(inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, y))


def test_what_the_plugin_refuses_is_not_launched(through: ThroughPlugin, recorded: Recorded) -> None:
    inputs, y = made(torch.float16, torch.float16)
    args = arguments(inputs.q, inputs.k, inputs.v, inputs.media_rows, inputs.phi, y)
    for field, value in (("head_size", 72), ("kv_dtype", 2), ("dtype", 9), ("scale", -1.0), ("batch", -1)):
        wrong = Args.from_buffer_copy(args)
        setattr(wrong, field, value)
        assert through.name(wrong) is None, field
        with pytest.raises(CudaFailed, match="cudaError 1"):
            through.launch(wrong)
    assert recorded.calls == 0


@pytest.mark.parametrize("layout", range_cases.LAYOUTS)
def test_arguments_of_ranges_arrive_as_they_were_given(ranges_through: RangeKernels, recorded: Recorded, layout: str) -> None:
    """Eight inputs in their order, heads that share keys, and the workspace."""
    for (dtype, kv_dtype), scale in itertools.product(kernel_cases.TYPES, (None, 0.25)):
        inputs = range_cases.make(
            range_cases.Case(layout, dtype, kv_dtype, 64, 16), torch.Generator().manual_seed(0), device="cpu"
        )
        y, workspace = torch.empty_like(inputs.q), torch.empty(16, dtype=torch.uint8)
        given = range_cases.arguments(inputs, y, workspace)
        if scale is not None:
            given.scale = scale
        before = recorded.range_calls
        ranges_through.launch(given, stream=1234)
        assert recorded.range_calls == before + 1
        assert recorded.stream == 1234
        for name in [field[0] for field in RangeArgs._fields_]:
            assert getattr(recorded.range_args, name) == getattr(given, name), (name, dtype, kv_dtype)
        # The launcher's own rule, of which the plugin asks for what its largest sizes want.
        batch, positions = inputs.phi.shape
        assert ranges_through.workspace(given) == batch * 1000000 + positions * 1000 + inputs.media_rows.shape[1]
    assert recorded.calls == 0


def test_shapes_of_ranges_are_judged_without_a_launch(ranges_through: RangeKernels, recorded: Recorded) -> None:
    assert range_cases.check_shapes(ranges_through, seed=0) == {"cases": 36, "failures": []}
    assert recorded.range_calls == 0


def test_what_the_ranges_plugin_refuses_is_not_launched(ranges_through: RangeKernels, recorded: Recorded) -> None:
    inputs = range_cases.make(
        range_cases.Case("ragged", torch.float16, torch.float16, 64, 16), torch.Generator().manual_seed(0), device="cpu"
    )
    args = range_cases.arguments(inputs, torch.empty_like(inputs.q), torch.empty(16, dtype=torch.uint8))
    for field, value in (("head_size", 72), ("kv_heads", 3), ("kv_dtype", 2), ("dtype", 9), ("scale", -1.0), ("batch", -1)):
        wrong = RangeArgs.from_buffer_copy(args)
        setattr(wrong, field, value)
        assert ranges_through.name(wrong) is None, field
        with pytest.raises(CudaFailed, match="cudaError 1"):
            ranges_through.launch(wrong)
    assert recorded.range_calls == 0
    recorded.answer = 700
    with pytest.raises(CudaFailed, match="cudaError 700"):
        ranges_through.launch(args)


def test_libraries_that_are_no_plugin(plugin_build: Path, tmp_path: Path) -> None:
    driver = plugin_build / "libthrough_plugin.so"
    with pytest.raises(ValueError, match="cannot open"):
        ThroughPlugin(driver, tmp_path / "absent.so")
    with pytest.raises(ValueError, match="does not export getCreators"):
        ThroughPlugin(driver, plugin_build / "libfake_launcher.so")
