"""Wheels that are taken along: pieces, and what is unpacked where."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest
from gpu import wheels

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
    held = pieces[1].read_bytes()
    pieces[1].unlink()
    assert wheels.join(tmp_path) == ([], [pieces[1].name])
    pieces[1].write_bytes(held)
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
    (target / "one.py").write_text("x = 3")
    wheels.unpacked(folder, target)
    assert (target / "one.py").read_text() == "x = 3"


@pytest.mark.parametrize("left_out", ["numpy", "onnxruntime"])
def test_all_dependencies_of_the_package_are_gathered_but_two(left_out):
    """numpy comes with PyTorch, ONNX Runtime is not small and only its own stage wants it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {name.split(">")[0].split("=")[0] for name in project["dependencies"]}
    gathered = {name.split(">")[0] for name in wheels.PACKAGES}
    assert left_out not in gathered
    assert wanted - gathered <= {"numpy", "onnxruntime"}, "scripts/gpu/wheels.py misses a dependency"
