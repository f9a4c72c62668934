"""TensorRT for RTX, and a task for any graph."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import trt_wheels
from fake_gpu import FakeGpu, install

from flamingo_export.bundle import verify

TARGET = "sm89"


@pytest.fixture
def rtx() -> ModuleType:
    """TensorRT for RTX, or a skip with a reason."""
    return trt_wheels.rtx()


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> None:
    """Nothing is kept from one test to the next."""
    monkeypatch.setattr(verify, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> FakeGpu:
    """CUDA and TensorRT for RTX, both stand-ins."""
    return install(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def nano_bundles(tmp_path_factory) -> dict[str, Path]:
    """Nano's trained weights in each storage type, as a build without engines leaves them."""
    import flamingo_export
    from flamingo_export.bundle.manifest import ShapeLimits
    from flamingo_export.sources.choice import source_for_size

    folder = tmp_path_factory.mktemp("nano")
    limits = ShapeLimits(max_length=512, chunk=64, bank_rows=16)
    made = {}
    for storage in ("fp32", "fp16", "bf16"):
        made[storage] = folder / f"{storage}.bundle"
        flamingo_export.build(source_for_size("nano"), out=made[storage], storage=storage, limits=limits, parity="skip")
    return made
