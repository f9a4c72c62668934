"""cuda-python for real as far as a machine without a driver goes: names, arguments, errors; and what the runtime makes of return codes."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trt_wheels

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.tensorrt import cuda as cuda_module
from flamingo_export.backends.tensorrt.cuda import Cuda, CudaError, CudaRuntime, DeviceLost, DeviceMemoryError
from flamingo_export.errors import BackendError, BackendLost

CALLS = {
    "use": (), "free_memory": (), "malloc": (64,), "free": (1,), "malloc_async": (64, 5), "free_async": (1, 5), "malloc_host": (64,),
    "free_host": (1,), "copy": (1, 2, 3, "to device", 5), "reaches": (1,),
    "copy_peer": (1, 2, 3, 1, 5), "fill": (1, 0, 3, 5), "destroy_stream": (5,), "synchronize": (5,),
    "event": (), "destroy_event": (6,), "record": (6, 5), "wait": (5, 6), "wait_on_host": (6,), "begin_capture": (5,),
    "end_capture": (5,), "launch": (7, 5), "destroy_graph": (7,),
}  # fmt: skip


@pytest.fixture
def runtime():
    """cuda-python's runtime module, or a skip."""
    return trt_wheels.cuda()


class Spy:
    """The module with its calls answered: each call of the real signature, `codes` of those that fail."""

    def __init__(self, real) -> None:
        self.real = real
        self.codes: dict[str, Any] = {}
        self.called: list[Any] = []

    def __getattr__(self, name):
        value = getattr(self.real, name)
        if not name.startswith("cuda") or not callable(value) or inspect.isclass(value) or name == "cudaGetErrorString":
            return value

        def call(*arguments):
            # The real one parses its arguments before it looks for a driver, so a wrong number or type is a TypeError here as well.
            results = value(*arguments)
            self.called.append(name)
            success = self.real.cudaError_t.cudaSuccess
            answers = [1 if result is None else result for result in results[1:]]
            if name == "cudaGetDeviceCount":
                answers = [1]
            return (self.codes.get(name, success), *answers)

        return call


@pytest.fixture
def spied(runtime) -> tuple[CudaRuntime, Spy]:
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU, which would take the made-up addresses for real ones")
    made = CudaRuntime.__new__(CudaRuntime)
    spy = Spy(runtime)
    made._cuda, made._greatest, made.dlpack_device, made._pools, made._reached = spy, -5, (2, 0), 1, {}
    made._kernels, made._kernels_tried = None, False
    return made, spy


def test_every_call_is_one_of_the_real_module(spied):
    made, spy = spied
    for name, arguments in CALLS.items():
        getattr(made, name)(*arguments)
    made.stream(first=True)
    made.abandon_capture(5)
    wanted = {name for name, value in vars(Cuda).items() if not name.startswith("_") and callable(value)}
    assert wanted == {*CALLS, "stream", "abandon_capture", "update", "choose"}  # the last two: test_step_kernels.py
    assert {"cudaMemcpyAsync", "cudaGraphInstantiate", "cudaStreamCreateWithPriority"} <= set(spy.called)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["cuda-12", "cuda-12-lowest"])
def test_cuda_12_has_the_same_calls(generation):
    """The bindings of CUDA 12, in a process of its own: every call, by name and arguments, the step kernels' among them."""
    trt_wheels.folder(generation)
    here = Path(__file__).parent
    tests = (
        "test_cuda.py::test_every_call_is_one_of_the_real_module",
        "test_cuda.py::test_codes_become_errors",
        "test_cuda.py::test_without_a_driver_it_says_so",
        "test_step_kernels.py::test_names_and_arguments_are_those_of_the_real_driver_module",
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *(str(here / test) for test in tests),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment[trt_wheels.CUDA_WHEELS] = generation
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=here.parents[2])
    assert done.returncode == 0, done.stdout
    assert f"{len(tests)} passed" in done.stdout, done.stdout


def test_without_a_driver_it_says_so(runtime):
    code, _ = runtime.cudaGetDeviceCount()
    if code == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    wanted = "CUDA 12: install driver 525" if trt_wheels.CUDA_WHEELS in os.environ else "CUDA 13: install driver 580"
    with pytest.raises(CudaError, match=rf"cudaGetDeviceCount failed with cudaErrorInsufficientDriver.*{wanted}|no NVIDIA GPU"):
        CudaRuntime()


def test_without_cuda_python_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match="pip install 'cuda-bindings"):
        CudaRuntime()


def test_codes_become_errors(spied):
    made, spy = spied
    errors = spy.real.cudaError_t
    spy.codes["cudaMalloc"] = errors.cudaErrorMemoryAllocation
    with pytest.raises(DeviceMemoryError, match=r"out of memory \(cudaMalloc of 3 MiB, .* are free\).*--fallback onnxruntime"):
        made.malloc(3 << 20)
    assert issubclass(DeviceMemoryError, MemoryError)
    with pytest.raises(DeviceMemoryError) as short:
        made.malloc(5)
    assert (short.value.asked, short.value.free) == (5, 1)
    spy.codes["cudaStreamSynchronize"] = errors.cudaErrorIllegalAddress
    with pytest.raises(
        DeviceLost, match=r"cudaStreamSynchronize failed with cudaErrorIllegalAddress.*start it again.*xid"
    ) as caught:
        made.synchronize(5)
    assert caught.value.name == "cudaErrorIllegalAddress"
    assert "cudaGetLastError" in spy.called
    assert all(hasattr(errors, name) for name in (*cuda_module._ADVICE, *cuda_module._LOST))
    spy.codes["cudaStreamSynchronize"] = errors.cudaErrorInvalidValue
    with pytest.raises(CudaError) as mistake:
        made.synchronize(5)
    assert not isinstance(mistake.value, BackendLost)


def test_a_graph_that_cannot_be_made_is_not_left(spied):
    made, spy = spied
    spy.codes["cudaGraphInstantiate"] = spy.real.cudaError_t.cudaErrorInvalidValue
    with pytest.raises(CudaError, match="cudaGraphInstantiate"):
        made.end_capture(5)
    assert spy.called[-1] == "cudaGraphDestroy"


def test_another_device_than_there_are(runtime, monkeypatch):
    spy = Spy(runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=spy))
    with pytest.raises(CudaError, match="there is 1 CUDA device, cuda:3 was asked for"):
        CudaRuntime(3)
    assert CudaRuntime()._greatest == 1


def test_each_thread_and_each_runtime_has_its_own_device(spied):
    """A thread's device is 0 until it is set; steps run on another thread than the one that opened the engine, and two GPUs share threads."""
    first, spy = spied
    second = CudaRuntime.__new__(CudaRuntime)
    second._cuda, second._greatest, second.dlpack_device = spy, -5, (2, 1)

    def calls(*runtimes: CudaRuntime) -> list[str]:
        spy.called.clear()
        found: list[list[str]] = []

        def work() -> None:
            for runtime in runtimes:
                runtime.malloc(64)
            found.append(list(spy.called))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    assert calls(first, first) == ["cudaSetDevice", "cudaMalloc", "cudaMalloc"]
    assert calls(second, first, first) == ["cudaSetDevice", "cudaMalloc"] * 2 + ["cudaMalloc"]


def test_without_memory_pools_memory_is_taken_and_given_back_at_once(spied):
    """Some virtual GPUs have none."""
    made, spy = spied
    made._pools = 0
    made.free_async(made.malloc_async(64, 5), 5)
    assert [name for name in spy.called if name != "cudaSetDevice"] == ["cudaMalloc", "cudaFree"]
    made._pools = 1
    spy.called.clear()
    made.free_async(made.malloc_async(64, 5), 5)
    assert spy.called == ["cudaMallocAsync", "cudaFreeAsync"]


@pytest.mark.parametrize(("device", "gpu"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:11", 11)])
def test_devices_by_name(device, gpu):
    assert SessionOptions(device=device).gpu == gpu


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "CUDA", "cuda:\u0661"])
def test_devices_that_are_none(device):
    with pytest.raises(BackendError, match="there is no device"):
        _ = SessionOptions(device=device).gpu
