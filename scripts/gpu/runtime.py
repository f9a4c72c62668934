"""Stages of the CUDA runtime without TensorRT: its sessions on the phi kernel, and nano end to end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gpu.engines import PACKAGE, without_cuda_python, without_modules
from gpu.stage import Context, Failed, NoDevice, Result


def without_runtime(context: Context) -> str | None:
    """The package's own dependencies, cuda-bindings, the kernels."""
    absent = without_modules(*PACKAGE)(context) or without_cuda_python()
    if absent:
        return f"{absent} (make gpu-wheels gathers them for a machine without network)"
    return None if context.kernels is not None else "the kernels' library, for want of nvcc or because it did not build"


def without_package(context: Context) -> str | None:
    absent = without_modules(*PACKAGE)(context)
    return f"{absent} (make gpu-wheels gathers them for a machine without network)" if absent else None


def run_sessions(context: Context) -> Result:
    """Sessions, streams, buffers, graphs: the phi kernel in the place of an engine."""
    from gpu import sessions

    card = _card()
    return judged(sessions.run(card, context.kernels.launch, seed=context.seed))


def run_nano(context: Context) -> Result:
    """Nano end to end: graphs by PyTorch and the phi kernel, cache, bank, beams and candidates in the card's memory."""
    from gpu import nano
    from gpu.torch_backend import kernel_attend

    with tempfile.TemporaryDirectory() as folder:
        bundles = nano.build_bundles(Path(folder))
        card = _card()
        import torch

        attend = kernel_attend(context.kernels.launch, lambda: torch.cuda.current_stream().cuda_stream)
        return judged(nano.run(card, attend, bundles))


def rehearse_nano(context: Context) -> Result:
    """In a dry run: the bundles, and the first CUDA call."""
    _with_package(context)
    from gpu import nano

    with tempfile.TemporaryDirectory() as folder:
        nano.build_bundles(Path(folder))
        _card()
    return {}


def rehearse_sessions(context: Context) -> Result:
    """In a dry run: the engine's contract, and the first CUDA call."""
    _with_package(context)
    from gpu import sessions

    sessions.contract(64)
    _card()
    return {}


def _with_package(context: Context) -> None:
    """Raises Failed where the package itself cannot be imported: then nothing is rehearsed."""
    absent = without_package(context)
    if absent:
        raise Failed(absent)


def _card() -> Any:
    """The first device. Raises NoDevice without one, or without cuda-bindings."""
    from flamingo_export.backends.tensorrt.cuda import CudaRuntime
    from flamingo_export.errors import BackendError
    from gpu.torch_backend import RealCard

    try:
        cuda = CudaRuntime()
    except BackendError as error:
        raise NoDevice(str(error)) from error
    return RealCard(cuda)


def judged(result: Result) -> Result:
    """A result whose parts name no failure. Raises Failed."""
    failures = [failure for part in result.values() if isinstance(part, dict) for failure in part.get("failures", ())]
    if failures:
        raise Failed(f"{len(failures)} failed, the first: {failures[0]}", result)
    return result
