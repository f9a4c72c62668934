"""A machine with a fake GPU and a fake TensorRT for RTX, and bundles with engines for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import onnx_ir as ir
import pytest
from fake_cuda import Machine
from fake_tensorrt import VERSION, FakeTensorRT, write_engine

from flamingo_export.backends.tensorrt import backend as backend_module
from flamingo_export.backends.tensorrt import library
from flamingo_export.backends.tensorrt import session as session_module
from flamingo_export.backends.tensorrt.engine_contract import contract_of
from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.bundle.manifest import EngineRecord, read_manifest, write_manifest
from flamingo_export.bundle.verify import file_record

TARGET = "sm89"
LIMITS: dict[str, Any] = {"bank_rows": 8, "chunk": 16, "batch": 3, "beams": 4, "frames": 4, "video_frames": 12}
"""Of engines small enough to run past them."""


class FakeGpu:
    """What the tests look at: the device (the first one of several), the machine, the library."""

    def __init__(self, *memory: int, peers: bool = True) -> None:
        self.machine = Machine(*memory, peers=peers)
        self.cuda = self.machine.devices[0]
        self.trt = FakeTensorRT(self.cuda)


def install(monkeypatch: pytest.MonkeyPatch, home: Path, *memory: int, peers: bool = True) -> FakeGpu:
    """Puts the fakes in the place of driver, cuda-python and TensorRT for RTX, and the home folder out of reach. memory: of each device."""
    found = FakeGpu(*(memory or (1 << 32,)), peers=peers)
    devices = found.machine.devices
    monkeypatch.setattr(session_module, "CHECK_MASKS", True)
    monkeypatch.setattr(library, "installed", lambda which: which is library.RTX)
    monkeypatch.setattr(library, "load", lambda which: found.trt)
    monkeypatch.setattr(library, "device", lambda index=0: library.Device(target=TARGET) if index < len(devices) else None)
    monkeypatch.setattr(library, "device_count", lambda: len(devices))
    monkeypatch.setattr(library, "cuda_python", lambda: True)
    monkeypatch.setattr(backend_module, "CudaRuntime", lambda device=0: devices[min(device, len(devices) - 1)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    return found


def add_engines(source: Path, bundle: Path, *, changes: Mapping[str, Mapping[str, Any]] | None = None, **limits: int) -> Path:
    """A copy of a bundle with an engine for each graph, for the fake TensorRT. changes: graph -> what its file says otherwise."""
    shutil.copytree(source, bundle)
    manifest = read_manifest(bundle)
    manifest = msgspec.structs.replace(manifest, limits=msgspec.structs.replace(manifest.limits, **limits))
    compute = manifest.precision.storage
    engines = []
    for graph in manifest.graphs:
        contract = contract_of(manifest, graph)
        model = lower(ir.load(bundle / graph.file), compute=compute, capacity=contract.capacity, native_functions=frozenset())
        add_candidates(model, contract.spec, banned=manifest.config.tokens.never)
        lowered = bundle / f"{graph.name}.tensorrt-rtx.onnx"
        save_lowered(model, lowered)
        path = bundle / "engines" / f"tensorrt-rtx-{TARGET}" / f"{graph.name}.engine"
        write_engine(path, lowered, contract, changes=(changes or {}).get(graph.name))
        file = file_record(bundle, path)
        engines.append(
            EngineRecord(
                graph=graph.name, file=file.path, backend="tensorrt-rtx", target=TARGET, tool_version=VERSION,
                sha256=file.sha256, size=file.size, lowered=lowered.name, compute=compute,
                banned=manifest.config.tokens.never,
            )
        )  # fmt: skip
    listed = (
        {record.path for record in manifest.files}
        | {engine.file for engine in engines}
        | {engine.lowered or "" for engine in engines}
    )
    files = tuple(file_record(bundle, bundle / path) for path in sorted(listed))
    write_manifest(bundle, msgspec.structs.replace(manifest, engines=tuple(engines), files=files))
    return bundle


def fake_library() -> Any:
    """Enough of TensorRT for RTX to choose a target."""
    module: Any = ModuleType("tensorrt_rtx")
    module.__version__ = "1.7.1.116"
    module.Builder = object
    module.ComputeCapability = type("ComputeCapability", (), {"SM80": 80, "SM86": 86, "SM89": 89, "SM120": 120, "NONE": 0})
    return module
