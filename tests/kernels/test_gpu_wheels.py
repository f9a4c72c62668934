"""Wheels that are taken along: pieces, and what is unpacked where."""

from __future__ import annotations

import importlib.metadata
import tomllib
import zipfile
from pathlib import Path

import pytest
from gpu import wheels
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder: Path, name: str, **files: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for module, text in files.items():
            file.writestr(f"{module}.py", text)
    return path


def test_pieces_are_what_they_were_cut_from(tmp_path):
    path = wheel(tmp_path, "large", large="x = 1\n" * 1000)
    data = path.read_bytes()
    pieces = wheels.split(path, 100)
    assert len(pieces) == -(-len(data) // 100)
    assert max(piece.stat().st_size for piece in pieces) <= 100
    assert not path.exists()
    held = {piece: piece.read_bytes() for piece in pieces[:2]}
    for count, piece in enumerate(held, 1):  # the first one too: any tells how many there are
        piece.unlink()
        assert wheels.join(tmp_path) == ([], [each.name for each in pieces[:count]])
    for piece, bytes_of in held.items():
        piece.write_bytes(bytes_of)
    assert wheels.join(tmp_path) == ([path], [])
    assert path.read_bytes() == data


def test_wheels_are_unpacked_once_and_onnxruntime_is_left(tmp_path):
    folder, target = tmp_path / "wheels", tmp_path / "site"
    assert wheels.unpacked(folder, target) is None
    folder.mkdir()
    wheel(folder, "one", one="x = 1")
    wheel(folder, "onnxruntime_gpu", onnxruntime="x = 2")
    assert wheels.unpacked(folder, target) == target
    assert sorted(path.name for path in target.glob("*.py")) == ["one.py"]
    (described,) = importlib.metadata.distributions(name="flamingo-export", path=[str(target)])
    assert described.version == importlib.metadata.version("flamingo-export")
    (target / "one.py").write_text("x = 3")
    wheels.unpacked(folder, target)
    assert (target / "one.py").read_text() == "x = 3"
    (folder / "one-1.0-py3-none-any.whl").rename(folder / "one-2.0-py3-none-any.whl")
    wheels.unpacked(folder, target)
    assert (target / "one.py").read_text() == "x = 1"  # another wheel: nothing of the old one is left


def needed(names: set[str], left_out: set[str]) -> set[str]:
    """Distributions that these need, and what those need, but for what is left out with its own needs."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found | left_out:
            continue
        found.add(name)
        requirements = map(Requirement, importlib.metadata.requires(name) or [])
        names |= {each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})}
    return found


def test_all_that_the_package_needs_is_gathered():
    """numpy and sympy come with PyTorch, ONNX Runtime is not small, and tokenizers asks for the hub's library only to download."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(each).name for each in project["dependencies"]}
    brought = {"numpy", "sympy", "onnxruntime", "huggingface-hub"}
    assert needed(wanted, brought) <= set(wheels.PACKAGES), "scripts/gpu/wheels.py misses some"


def test_versions_are_those_of_the_lock_file():
    pinned = wheels.locked(wheels.PACKAGES)
    assert len(pinned) == len(wheels.PACKAGES)
    assert any(each.startswith("pydantic-core==") for each in pinned)  # pydantic takes one version of it and no other
    with pytest.raises(KeyError):
        wheels.locked(["no-such-package"])


@pytest.mark.parametrize("size", [900, 1100])
def test_more_than_can_be_taken_along_is_refused(size, tmp_path, monkeypatch):
    """A folder above the limit fails the command; what lay there from before is not counted."""

    def download(packages, folder: Path) -> None:
        (folder / "one.whl").write_bytes(b"x" * (size - 100))
        (folder / "two.whl").write_bytes(b"x" * 100)

    (tmp_path / "old.whl").write_bytes(b"x" * 5000)
    assert wheels.MOST_BYTES == 60 << 20
    monkeypatch.setattr(wheels, "download", download)
    monkeypatch.setattr(wheels, "MOST_BYTES", 1000)
    monkeypatch.setattr("sys.argv", ["wheels.py", "--out", str(tmp_path)])
    if size <= 1000:
        wheels.main()
    else:
        with pytest.raises(SystemExit, match="the wheels are larger than"):
            wheels.main()


def test_the_bindings_are_of_the_cuda_that_is_asked_for(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(wheels, "download", lambda packages, folder: asked.extend(packages))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words, extra in (([], "tensorrt"), (["--cuda", "12"], "tensorrt-cu12")):
        asked.clear()
        monkeypatch.setattr("sys.argv", ["wheels.py", "--out", str(tmp_path), *words])
        wheels.main()
        assert [each for each in asked if each.startswith("cuda-bindings")] == extras[extra]
    assert wheels.ONNXRUNTIME[0] in extras["gpu"]


def test_a_large_wheel_is_taken_along_in_pieces(tmp_path, monkeypatch):
    """ONNX Runtime's, each piece within the limit; small ones beside it stay whole."""

    def download(packages, folder: Path) -> None:
        if packages == wheels.ONNXRUNTIME:
            (folder / "onnxruntime_gpu.whl").write_bytes(b"x" * 2500)
            (folder / "flatbuffers.whl").write_bytes(b"x" * 10)

    monkeypatch.setattr(wheels, "download", download)
    monkeypatch.setattr(wheels, "MOST_BYTES", 1000)
    monkeypatch.setattr(wheels.split, "__defaults__", (1000,))
    monkeypatch.setattr("sys.argv", ["wheels.py", "--out", str(tmp_path), "--onnxruntime-gpu"])
    wheels.main()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "onnxruntime").iterdir()}
    pieces = {f"onnxruntime_gpu.whl.piece-{number}-of-3": size for number, size in ((1, 1000), (2, 1000), (3, 500))}
    assert sizes == {**pieces, "flatbuffers.whl": 10}
