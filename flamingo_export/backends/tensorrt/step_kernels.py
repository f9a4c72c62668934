"""Our kernels of a decoding step (`trt_plugins/step`), launched through the driver's interface: PTX that the driver compiles for its card.

They need neither a compiler nor the plugin library, so that steps on TensorRT for RTX and ONNX Runtime have them too.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

PTX = Path(__file__).with_name("step.ptx")
THREADS = 128
UPDATE = np.dtype([("where", np.uint64), ("what", np.uint64)])
"""Eight bytes at the address `where` become `what`, or with FROM_MEMORY those that lie at the address `what`."""
FROM_MEMORY = np.uint64(1)
CHOICE = np.dtype(
    [
        ("target", np.uint64), ("branch", np.int64), ("top_k", np.int64), ("temperature", np.float64), ("top_p", np.float64),
        ("min_p", np.float64), ("uniform", np.float64),
    ]
)  # fmt: skip
"""How one branch's token is chosen, and the address that it goes to. temperature 0: the likeliest; top_p, min_p 0: no such bound."""
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class DriverError(Exception):
    """A call of the driver's that failed, by the name of its code."""


class StepKernels:
    """Both kernels, compiled for the device that is the calling thread's."""

    def __init__(self, driver: Any) -> None:
        """driver: `cuda.bindings.driver`. Raises DriverError."""
        self._driver = driver
        (self._module,) = self._asked("cuModuleLoadData", PTX.read_bytes() + b"\0")
        (self._update,) = self._asked("cuModuleGetFunction", self._module, b"flamingo_step_update")
        (self._choose,) = self._asked("cuModuleGetFunction", self._module, b"flamingo_step_choose")

    def update(self, updates: int, count: int, stream: int) -> None:
        """Carries out `count` UPDATEs that lie at `updates` on the device. Raises DriverError."""
        self._launch(self._update, count, stream, (updates, count), (_POINTER, _NUMBER))

    def choose(self, choices: int, count: int, values: int, ids: int, n: int, stream: int) -> None:
        """Carries out `count` CHOICEs that lie at `choices`, among candidates of n each. Raises DriverError."""
        kinds = (_POINTER, _NUMBER, _POINTER, _POINTER, _NUMBER)
        self._launch(self._choose, count, stream, (choices, count, values, ids, n), kinds)

    def _launch(self, kernel: Any, count: int, stream: int, values: tuple[int, ...], kinds: tuple[Any, ...]) -> None:
        blocks = -(-count // THREADS)
        handle = self._driver.CUstream(stream)
        self._asked("cuLaunchKernel", kernel, blocks, 1, 1, THREADS, 1, 1, 0, handle, (values, kinds), 0)

    def _asked(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        code, *results = getattr(self._driver, function)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise DriverError(f"{function} failed with {code.name}")
        return tuple(results)
