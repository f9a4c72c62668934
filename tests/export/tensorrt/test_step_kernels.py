"""The kernels of a decoding step: their code on this CPU against what numpy makes of the same, the PTX that ships, and how it is launched."""

from __future__ import annotations

import ctypes
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trt_wheels

from flamingo_export.backends.tensorrt import step_kernels
from flamingo_export.backends.tensorrt.cuda import CudaError, CudaRuntime
from flamingo_export.backends.tensorrt.step_kernels import CHOICE, FROM_MEMORY, UPDATE, DriverError, StepKernels
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import StopRule

ROOT = Path(__file__).parents[3]
EMULATED = """
#include "step.h"
extern "C" void update(const flamingo_update* updates, int64_t count) {
    for (int64_t i = 0; i < count; ++i) flamingo_apply(updates[i]);
}
extern "C" void choose(const flamingo_choice* choices, int64_t count, const float* values, const int64_t* ids, int64_t n) {
    for (int64_t i = 0; i < count; ++i) flamingo_choose(choices[i], values, ids, n);
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """The kernels' code, thread by thread on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler (g++)")
    folder = tmp_path_factory.mktemp("step")
    source, made = folder / "step.cpp", folder / "step.so"
    source.write_text(EMULATED)
    command = [
        "g++",
        "-O1",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'trt_plugins' / 'step'}",
        str(source),
        "-o",
        str(made),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))


def test_records_are_laid_out_as_the_kernels_read_them():
    assert (UPDATE.itemsize, CHOICE.itemsize) == (16, 56)
    assert [CHOICE.fields[name][1] for name in CHOICE.names] == list(range(0, 56, 8))  # type: ignore[index, union-attr]


def test_updates(emulated):
    memory, elsewhere = np.arange(16, dtype=np.uint64), np.array([77, 88], np.uint64)
    updates = np.zeros(3, UPDATE)
    start = np.uint64(memory.ctypes.data)
    updates["where"] = [start + np.uint64(8), start + np.uint64(120), (start + np.uint64(40)) | FROM_MEMORY]
    updates["what"] = [1 << 63, 5, elsewhere.ctypes.data + 8]
    emulated.update(ctypes.c_void_p(updates.ctypes.data), ctypes.c_int64(3))
    expected = np.arange(16, dtype=np.uint64)
    expected[[1, 15, 5]] = [1 << 63, 5, 88]
    assert np.array_equal(memory, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 0.3, "top_k": 9, "top_p": 0.9},
        {"temperature": 2.5, "top_k": 9, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.7, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 9, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 9, "min_p": 1.0},
        {"temperature": 1e-6, "top_k": 9},
    ],
    ids=str,
)
def test_a_token_is_chosen_as_the_search_chooses_it(emulated, settings):
    """2,000 draws of each kind, with ties and with candidates that are minus infinity."""
    random, n, count = np.random.default_rng(5), 9, 2000
    values = -np.sort(-random.normal(size=(count, n)).astype(np.float32) * 3, axis=1)
    values[::7] = np.round(values[::7])
    values[::11, 6:] = -np.inf
    ids = random.integers(0, 1 << 40, (count, n))
    uniform = random.random(count)
    search = Sampling(StopRule(eoc=2, banned=3, max_new_tokens=9), seed=1, **settings)
    tokens, choices = np.zeros(count, np.int64), np.zeros(count, CHOICE)
    order = random.permutation(count)
    choices["target"], choices["branch"] = tokens.ctypes.data + 8 * np.arange(count), order
    choices["uniform"] = uniform
    for name in ("temperature", "top_k", "top_p", "min_p"):
        choices[name] = settings.get(name, 0)
    pointer = ctypes.c_void_p
    emulated.choose(
        pointer(choices.ctypes.data),
        ctypes.c_int64(count),
        pointer(values.ctypes.data),
        pointer(ids.ctypes.data),
        ctypes.c_int64(n),
    )

    class Given:
        """A generator of one number."""

        def __init__(self, number: float) -> None:
            self.number = number

        def random(self) -> float:
            return self.number

    expected = []
    for at, branch in enumerate(order):
        own = values[branch, : settings.get("top_k")]
        place = search._draw_sorted(own, Given(uniform[at])) if settings["temperature"] else 0  # type: ignore[arg-type]
        expected.append(ids[branch, place])
    assert np.array_equal(tokens, expected)


@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("ptxas") is None, reason="needs nvcc and ptxas")
def test_the_ptx_that_ships_is_that_of_the_source():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "step_kernels", "--check"], capture_output=True, text=True, check=False
    )
    if "V13.0" not in subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("another nvcc writes other PTX; it was made by 13.0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_ptx_is_for_every_card():
    text = step_kernels.PTX.read_text()
    assert ".version 6.3" in text
    assert ".target sm_75" in text
    assert "/work" not in text
    assert "/home" not in text


class Driver:
    """Answers as the driver does; `fails` is refused."""

    class CUresult:
        CUDA_SUCCESS = 0

    class _Refused:
        name = "CUDA_ERROR_INVALID_PTX"

    def __init__(self, fails: str = "") -> None:
        self.fails, self.asked = fails, []  # type: ignore[var-annotated]

    def CUstream(self, stream):  # noqa: N802
        return ("stream", stream)

    def __getattr__(self, name):
        def call(*arguments):
            self.asked.append((name, arguments))
            return (self._Refused() if name == self.fails else 0, len(self.asked))

        return call


def test_kernels_are_launched_with_what_they_take():
    driver = Driver()
    kernels = StepKernels(driver)
    kernels.update(0x1000, 300, 5)
    kernels.choose(0x2000, 3, 0x3000, 0x4000, 9, 5)
    (_, (_, *grid, shared, stream, (values, kinds), extra)), (_, chosen) = driver.asked[-2:]
    assert (grid, shared, stream, extra) == ([3, 1, 1, 128, 1, 1], 0, ("stream", 5), 0)
    assert (values, kinds) == ((0x1000, 300), (ctypes.c_void_p, ctypes.c_int64))
    assert chosen[-2][0] == (0x2000, 3, 0x3000, 0x4000, 9)
    names = [name for name, _ in driver.asked]
    assert names == ["cuModuleLoadData", "cuModuleGetFunction", "cuModuleGetFunction", "cuLaunchKernel", "cuLaunchKernel"]


def test_names_and_arguments_are_those_of_the_real_driver_module():
    trt_wheels.cuda()
    from cuda.bindings import driver

    for name, count in (("cuModuleLoadData", 1), ("cuModuleGetFunction", 2), ("cuLaunchKernel", 11)):
        text = inspect.getdoc(getattr(driver, name)) or ""
        assert len(text[text.index("(") + 1 : text.index(")")].split(",")) == count, name
    assert driver.CUresult.CUDA_SUCCESS == 0
    assert driver.CUstream(5)


def test_where_the_driver_refuses_them_it_is_said_once_and_steps_go_on(monkeypatch, caplog):
    made = CudaRuntime.__new__(CudaRuntime)
    made._kernels, made._kernels_tried, made.dlpack_device = None, False, (2, 0)
    monkeypatch.setattr(made, "_call", lambda *arguments: ())

    def refused(driver):
        raise DriverError("cuModuleLoadData failed with CUDA_ERROR_INVALID_PTX")

    monkeypatch.setattr("flamingo_export.backends.tensorrt.cuda.StepKernels", refused)
    trt_wheels.cuda()
    assert [made.step_kernels, made.step_kernels] == [False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "steps send masks whole and wait for each other: the driver does not take our kernels (cuModuleLoadData failed with "
        "CUDA_ERROR_INVALID_PTX)"
    ]


def test_a_launch_that_fails_is_an_error_of_cuda(monkeypatch):
    made = CudaRuntime.__new__(CudaRuntime)
    made.dlpack_device, made._kernels_tried = (2, 0), True
    made._kernels = StepKernels(Driver("cuLaunchKernel"))
    monkeypatch.setattr(made, "use", lambda: None)
    with pytest.raises(
        CudaError, match="the step's kernel 'update' was not launched: cuLaunchKernel failed with CUDA_ERROR_INVALID_PTX"
    ):
        made.update(1, 2, 3)
