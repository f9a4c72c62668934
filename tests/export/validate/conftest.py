"""One recorded and compared tiny bundle, shared: recording takes seconds, comparing a copy of it does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from flamingo_export.backends.base import Backend
from flamingo_export.backends.onnxruntime import OnnxRuntimeBackend
from flamingo_export.bundle.manifest import read_manifest, write_manifest
from flamingo_export.bundle.verify import file_record
from flamingo_export.sources import LiveSource
from flamingo_export.validate import ParityReport, check_build
from flamingo_export.validate.expected.golden import Goldens, load_goldens
from flamingo_export.validate.parity import compare_with
from flamingo_reference.model import Flamingo

MEMORY = 4 << 30
GOLDEN = ("golden/cases.json", "golden/tensors.safetensors")
Compare = Callable[..., ParityReport]


def list_goldens(bundle: Path) -> None:
    """Writes the bundle's golden values, as they now are, into its manifest."""
    manifest = read_manifest(bundle)
    files = [record for record in manifest.files if record.path not in GOLDEN]
    files += [file_record(bundle, bundle / name) for name in GOLDEN if (bundle / name).exists()]
    write_manifest(bundle, msgspec.structs.replace(manifest, files=tuple(files)))


@pytest.fixture(scope="session")
def checked(tiny_bundle: Path, tiny_model: Flamingo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParityReport]:
    """A bundle with golden values and reports, and the report of the check that made them."""
    torch.set_num_threads(1)
    bundle = tmp_path_factory.mktemp("checked") / "tiny.bundle"
    shutil.copytree(tiny_bundle, bundle)
    report = check_build(bundle, read_manifest(bundle), LiveSource(tiny_model), memory=MEMORY)
    list_goldens(bundle)
    return bundle, report


@pytest.fixture(scope="session")
def goldens(checked: tuple[Path, ParityReport]) -> Goldens:
    """What the reference computes with the tiny model."""
    found = load_goldens(checked[0] / "golden")
    assert found is not None
    return found


@pytest.fixture
def copy(checked: tuple[Path, ParityReport], tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(checked[0], tmp_path / "copy.bundle"))


@pytest.fixture
def compare(goldens: Goldens) -> Compare:
    """Compares a bundle with the shared golden values."""

    def run(bundle: Path, *, backend: Backend | None = None, memory: int = MEMORY) -> ParityReport:
        return compare_with(bundle, read_manifest(bundle), goldens, backend or OnnxRuntimeBackend(), "golden", memory=memory)

    return run
