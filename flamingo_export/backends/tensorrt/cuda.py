"""The CUDA runtime calls that sessions need, behind a protocol: the real ones through cuda-python, each return code checked.

Handles (streams, events, graphs) and addresses are plain ints, so that whatever stands in for CUDA in tests needs no classes of cuda-python.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any, Literal, Protocol

from flamingo_export.backends.tensorrt import dlpack
from flamingo_export.backends.tensorrt.step_kernels import DriverError, StepKernels
from flamingo_export.errors import BackendError, BackendLost

Direction = Literal["to device", "to host", "on device"]

NO_PEERS = "FLAMINGO_NO_PEERS"
"""Environment variable; set, copies between GPUs go through the host, for machines whose direct ones are wrong (IOMMU, ACS)."""
CUDA_12 = "pip install 'cuda-bindings>=12.9,<13'"
INSTALL = f"pip install 'cuda-bindings>=13,<14', or for CUDA 12 {CUDA_12}"
OUT_OF_MEMORY = (
    "Close what else uses the GPU, use smaller batches, build with a smaller --max-batch or --max-length or with 16-bit weights "
    "(--storage), share a decoder in parts (--parts) among GPUs (--device cuda:0,cuda:1), or do without it: --fallback onnxruntime"
)
# What CUDA calls an error -> what to do about it.
_ADVICE = {
    "cudaErrorNoDevice": "There is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it",
    "cudaErrorInvalidDevice": "There is no such GPU",
    "cudaErrorDevicesUnavailable": "Another process has the GPU for itself (exclusive mode)",
}
_LOST = frozenset(
    {
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorMisalignedAddress",
        "cudaErrorHardwareStackError",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorECCUncorrectable",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorContextIsDestroyed",
        "cudaErrorAssert",
        "cudaErrorUnknown",
    }
)
"""Errors after which every further call of the process fails, as CUDA documents them; the driver's log has an Xid of most."""
_WHEN_LOST = (
    "The GPU cannot be used by this process any more: start it again. The driver's log says why (dmesg | grep -i xid): of hardware (Xid 48, 63, "
    "64, 74, 79, 94, 95) the GPU must be reset or replaced; else please report this"
)


_OTHERWISE = "See the driver's log"
_log = logging.getLogger(__name__)
_current = threading.local()
"""`device`: what a thread's device was last set to here."""


class CudaError(BackendError):
    """A CUDA call that failed; `name` is what CUDA calls the error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class DeviceMemoryError(CudaError, MemoryError):
    """Memory of the device, or pinned memory of the host, that is not to be had. asked, free: bytes, where they are known."""

    def __init__(self, name: str, message: str, *, asked: int | None = None, free: int | None = None) -> None:
        super().__init__(name, message)
        self.asked, self.free = asked, free


class DeviceLost(CudaError, BackendLost):
    """After it every call of the process on its device fails."""


class Cuda(Protocol):
    """What sessions ask of CUDA. Copies and kernels run in the order of their stream; each call raises CudaError."""

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """How DLPack names the device that its memory is on: kind and index."""

    def use(self) -> None:
        """Makes its device the calling thread's, for what TensorRT is asked next."""

    def free_memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""

    def malloc(self, size: int) -> int:
        """Device memory, aligned to 256 bytes. Raises DeviceMemoryError."""

    def free(self, address: int) -> None:
        """Waits for what still uses it."""

    def malloc_async(self, size: int, stream: int) -> int:
        """Device memory for what `stream` does from now on. Raises DeviceMemoryError."""

    def free_async(self, address: int, stream: int) -> None:
        """Gives it back once `stream` has done what it was asked before."""

    def malloc_host(self, size: int) -> int:
        """Pinned memory of the host: copies from and to it are asynchronous. Raises DeviceMemoryError."""

    def free_host(self, address: int) -> None: ...

    def copy(self, target: int, source: int, size: int, direction: Direction, stream: int) -> None: ...

    def reaches(self, index: int) -> bool:
        """Whether copies from the device of that number come straight to this one."""

    def copy_peer(self, target: int, source: int, size: int, index: int, stream: int) -> None:
        """Copies to memory of this device from memory of the device `index`, which it reaches, in the order of a stream of this one."""

    def fill(self, address: int, byte: int, size: int, stream: int) -> None: ...

    def stream(self, *, first: bool) -> int:
        """A stream that does not wait for the default one. first: its kernels go before those of other streams."""

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Waits until the stream has done all it was asked."""

    def event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """The event is what the stream was asked so far."""

    def wait(self, stream: int, event: int) -> None:
        """What the stream is asked from now on waits for the event; the host does not."""

    def wait_on_host(self, event: int) -> None: ...

    def begin_capture(self, stream: int) -> None:
        """From now on what this thread asks of the stream goes into a graph and is not run."""

    def end_capture(self, stream: int) -> int:
        """The graph, ready to launch."""

    def abandon_capture(self, stream: int) -> None:
        """Ends a capture that failed and forgets the error."""

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    @property
    def step_kernels(self) -> bool:
        """Whether there are `update` and `choose`. Not to be asked first within a capture."""

    def update(self, updates: int, count: int, stream: int) -> None:
        """Carries out `count` updates (`step_kernels.UPDATE`) that lie at this address of the device."""

    def choose(self, choices: int, count: int, values: int, ids: int, n: int, stream: int) -> None:
        """Carries out `count` choices (`step_kernels.CHOICE`) among candidates, fp32 and int64 [..., n] at these addresses."""


def _too_old() -> str:
    """What to do about the driver, by the CUDA that the bindings are of."""
    version = str(getattr(sys.modules.get("cuda.bindings"), "__version__", ""))
    if version.startswith("12."):
        return "The NVIDIA driver is missing or too old for CUDA 12: install driver 525 or later"
    return f"The NVIDIA driver is missing or too old for CUDA 13: install driver 580 or later, or with an older one {CUDA_12}"


class CudaRuntime:
    """CUDA's runtime library, through cuda-python, on one device."""

    def __init__(self, device: int = 0) -> None:
        """Raises BackendError where cuda-python is not installed, and CudaError without driver or device."""
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(f"running engines needs cuda-python's bindings ({error}). {INSTALL}") from error
        self._cuda: Any = runtime
        self.dlpack_device = (dlpack.CUDA, device)
        (count,) = self._asked("cudaGetDeviceCount")
        if count <= device:
            there = "is 1 CUDA device" if count == 1 else f"are {count} CUDA devices"
            raise CudaError(
                "cudaErrorInvalidDevice",
                f"there {there}, cuda:{device} was asked for. They are counted from 0: --device cuda:0",
            )
        self.use()
        _, self._greatest = self._call("cudaDeviceGetStreamPriorityRange")
        attribute = runtime.cudaDeviceAttr.cudaDevAttrMemoryPoolsSupported
        (self._pools,) = self._call("cudaDeviceGetAttribute", attribute, device)
        self._reached: dict[int, bool] = {}
        self._kernels: StepKernels | None = None
        self._kernels_tried = False

    def use(self) -> None:
        """Makes its device the calling thread's, as libraries want it that are called next. Each thread has a device of its own, 0 at first."""
        device = self.dlpack_device[1]
        self._asked("cudaSetDevice", device)
        _current.device = device

    def _call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """The results of a call on its device, whichever thread calls. Raises as `_asked` does."""
        if getattr(_current, "device", None) != self.dlpack_device[1]:
            self.use()
        return self._asked(function, *arguments)

    def _asked(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """The results of a call, without its return code. Raises CudaError for any code but success."""
        code, *results = getattr(self._cuda, function)(*arguments)
        if code == self._cuda.cudaError_t.cudaSuccess:
            return tuple(results)
        name = code.name
        self._cuda.cudaGetLastError()  # an error that is not sticky is not to be met again by the next call
        if name == "cudaErrorMemoryAllocation":
            raise self._short_of_memory(function, arguments)
        _, text = self._cuda.cudaGetErrorString(code)
        failure = f"{function} failed with {name} ({bytes(text).decode(errors='replace')})"
        if name in _LOST:
            raise DeviceLost(name, f"{failure}. {_WHEN_LOST}.")
        advice = _too_old() if name == "cudaErrorInsufficientDriver" else _ADVICE.get(name, _OTHERWISE)
        raise CudaError(name, f"{failure}. {advice}.")

    def _short_of_memory(self, function: str, arguments: tuple[Any, ...]) -> DeviceMemoryError:
        wanted = f" of {arguments[0] / 2**20:.0f} MiB" if arguments and isinstance(arguments[0], int) else ""
        code, *found = self._cuda.cudaMemGetInfo()
        left = (
            f", {found[0] / 2**20:.0f} of {found[1] / 2**20:.0f} MiB are free"
            if code == self._cuda.cudaError_t.cudaSuccess
            else ""
        )
        message = f"CUDA is out of memory ({function}{wanted}{left}). {OUT_OF_MEMORY}."
        return DeviceMemoryError(
            "cudaErrorMemoryAllocation", message, asked=arguments[0] if wanted else None, free=int(found[0]) if left else None
        )

    def free_memory(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, size: int) -> int:
        (address,) = self._call("cudaMalloc", size)
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def malloc_async(self, size: int, stream: int) -> int:
        if not self._pools:  # as on some virtual GPUs
            return self.malloc(size)
        (address,) = self._call("cudaMallocAsync", size, stream)
        return int(address)

    def free_async(self, address: int, stream: int) -> None:
        if not self._pools:
            self.free(address)  # which waits for what still uses it
            return
        self._call("cudaFreeAsync", address, stream)

    def malloc_host(self, size: int) -> int:
        (address,) = self._call("cudaMallocHost", size)
        return int(address)

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def copy(self, target: int, source: int, size: int, direction: Direction, stream: int) -> None:
        kinds = self._cuda.cudaMemcpyKind
        kind = {
            "to device": kinds.cudaMemcpyHostToDevice,
            "to host": kinds.cudaMemcpyDeviceToHost,
            "on device": kinds.cudaMemcpyDeviceToDevice,
        }[direction]
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def reaches(self, index: int) -> bool:
        if index not in self._reached:
            self._reached[index] = not os.environ.get(NO_PEERS) and self._enabled(index)
        return self._reached[index]

    def _enabled(self, index: int) -> bool:
        """Opens the way from another device, where there is one."""
        (possible,) = self._call("cudaDeviceCanAccessPeer", self.dlpack_device[1], index)
        if not possible:
            return False
        try:
            self._call("cudaDeviceEnablePeerAccess", index, 0)
        except DeviceLost:
            raise
        except CudaError as error:  # whoever shares the process may have opened it; a device has a bounded number of peers
            return error.name == "cudaErrorPeerAccessAlreadyEnabled"
        return True

    def copy_peer(self, target: int, source: int, size: int, index: int, stream: int) -> None:
        # Unlike cudaMemcpyAsync it is right for memory of pools too, which peers do not see by themselves.
        self._call("cudaMemcpyPeerAsync", target, self.dlpack_device[1], source, index, size, stream)

    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", address, byte, size, stream)

    def stream(self, *, first: bool) -> int:
        # Priorities go from least to greatest, the greatest being the smallest number; 0 is an ordinary stream's.
        priority = self._greatest if first else 0
        (stream,) = self._call("cudaStreamCreateWithPriority", self._cuda.cudaStreamNonBlocking, priority)
        return int(stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> int:
        (event,) = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        return int(event)

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def wait_on_host(self, event: int) -> None:
        self._call("cudaEventSynchronize", event)

    def begin_capture(self, stream: int) -> None:
        # Thread-local: other threads of the process may allocate while this one captures.
        self._call("cudaStreamBeginCapture", stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> int:
        (graph,) = self._call("cudaStreamEndCapture", stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return int(executable)

    def abandon_capture(self, stream: int) -> None:
        code, graph = self._cuda.cudaStreamEndCapture(stream)
        if code == self._cuda.cudaError_t.cudaSuccess:
            self._cuda.cudaGraphDestroy(graph)
        self._cuda.cudaGetLastError()

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    @property
    def step_kernels(self) -> bool:
        if not self._kernels_tried:
            self._kernels_tried = True
            self._call("cudaFree", 0)  # which makes the device's context, if nothing has yet
            try:
                from cuda.bindings import driver

                self._kernels = StepKernels(driver)
            except (DriverError, ImportError, OSError, RuntimeError) as error:
                _log.warning("steps send masks whole and wait for each other: the driver does not take our kernels (%s)", error)
        return self._kernels is not None

    def update(self, updates: int, count: int, stream: int) -> None:
        self._launched("update", updates, count, stream)

    def choose(self, choices: int, count: int, values: int, ids: int, n: int, stream: int) -> None:
        self._launched("choose", choices, count, values, ids, n, stream)

    def _launched(self, kernel: str, *arguments: int) -> None:
        assert self._kernels is not None, "no kernels: ask step_kernels first"
        if getattr(_current, "device", None) != self.dlpack_device[1]:
            self.use()
        try:
            getattr(self._kernels, kernel)(*arguments)
        except DriverError as error:
            raise CudaError(
                "cudaErrorLaunchFailure", f"the step's kernel {kernel!r} was not launched: {error}. {_OTHERWISE}."
            ) from error
