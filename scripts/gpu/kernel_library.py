"""The kernels' C interface through ctypes, over torch tensors."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
CUDA_ERRORS = {35: "the driver is older than this CUDA, or there is none", 100: "no CUDA device"}


class CudaFailed(Exception):
    """A launch returned an error; `code` is the cudaError_t."""

    def __init__(self, code: int) -> None:
        super().__init__(f"cudaError {code}: {CUDA_ERRORS.get(code, 'see cudaError_t')}")
        self.code = code


class Args(ctypes.Structure):
    """flamingo_phi_cross_attention_args of phi_cross_attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "media_rows", "phi", "k_scale", "v_scale", "y")),
        *((name, ctypes.c_int32) for name in ("batch", "positions", "heads", "head_size", "latents", "media", "bank_rows")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
        ("kv_dtype", ctypes.c_int),
    )


class Kernels:
    """libflamingo_kernels.so."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._launch = library.flamingo_phi_cross_attention
        self._launch.argtypes = [ctypes.POINTER(Args), ctypes.c_void_p]
        self._launch.restype = ctypes.c_int
        self._name = library.flamingo_phi_cross_attention_kernel
        self._name.argtypes = [ctypes.POINTER(Args)]
        self._name.restype = ctypes.c_char_p

    def launch(self, args: Args, stream: int = 0) -> None:
        """Enqueues the computation. Raises CudaFailed."""
        code = int(self._launch(ctypes.byref(args), stream))
        if code:
            raise CudaFailed(code)

    def name(self, args: Args) -> str | None:
        """Which kernel would be chosen, None where the arguments are refused."""
        found: bytes | None = self._name(ctypes.byref(args))
        return found.decode() if found is not None else None

    def __call__(self, args: Args) -> None:
        """On torch's current stream."""
        self.launch(args, torch.cuda.current_stream().cuda_stream)


class ThroughPlugin(Kernels):
    """The same calls by way of the plugin library, each as TensorRT makes it. `name` is "plugin" where the plugin takes the arguments."""

    def __init__(self, driver: Path, plugin: Path) -> None:
        """Raises ValueError for a library that TensorRT would not take."""
        super().__init__(driver)
        load = ctypes.CDLL(str(driver)).flamingo_load_plugin
        load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_char_p
        fault: bytes | None = load(str(plugin).encode())
        if fault is not None:
            raise ValueError(f"{plugin}: {fault.decode()}")


def arguments(
    q: Tensor, k: Tensor, v: Tensor, media_rows: Tensor, phi: Tensor, y: Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, scale: float | None = None,
) -> Args:  # fmt: skip
    """q, y [B,S,H,D]; k, v [N,H,R,D]; media_rows int64 [B,M]; phi int64 [B,S]; scales fp32 of one number. The tensors must outlive the call."""
    for tensor in (q, k, v, media_rows, phi, y):
        if not tensor.is_contiguous():
            raise ValueError("tensors must be contiguous")
    batch, positions, heads, head_size = q.shape
    return Args(
        *(t.data_ptr() if t is not None else None for t in (q, k, v, media_rows, phi, k_scale, v_scale, y)),
        batch, positions, heads, head_size, k.shape[2], media_rows.shape[1], k.shape[0],
        scale if scale is not None else head_size**-0.5,
        DTYPES[q.dtype], DTYPES[k.dtype],
    )  # fmt: skip
