"""Which cards a library runs on: read from files made here, from one that nvcc made, and refused in words."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from flamingo_export.backends.tensorrt.machine_code import MachineCode, check_card, machine_code
from flamingo_export.errors import BackendError


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """(kind, architecture, code) -> as nvcc lays it out, headers of 64 bytes."""
    body = b""
    for kind, architecture, code in entries:
        header = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(code), 0, 64, 7, 1, architecture)
        body += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(folder: Path, *parts: bytes) -> Path:
    path = folder / "lib.so"
    path.write_bytes(b"\x7fELF" + b"x" * 99 + b"".join(part + b"between" for part in parts))
    return path


def test_every_entry_of_every_source_is_found(tmp_path):
    first = fat_binary((2, 80, b"c" * 200), (2, 86, b"d" * 7), (1, 80, b"p" * 33))
    second = fat_binary((2, 120, b"e" * 64))
    assert machine_code(library(tmp_path, first, second)) == MachineCode(cubins=(80, 86, 120), ptx=(80,))
    assert machine_code(library(tmp_path)) == MachineCode(cubins=(), ptx=())


def test_a_file_that_was_cut_or_is_empty(tmp_path):
    path = library(tmp_path, fat_binary((2, 80, b"c" * 200), (2, 90, b"d" * 200)))
    path.write_bytes(path.read_bytes()[:-250])
    assert machine_code(path).cubins == (80,)
    path.write_bytes(b"")
    with pytest.raises(BackendError, match="cannot be read"):
        machine_code(path)


@pytest.mark.parametrize(
    ("cubins", "ptx", "runs", "not_"),
    [
        (
            (80, 86, 89, 90, 100, 120),
            (120,),
            (80, 86, 89, 90, 100, 103, 120, 121),
            (75, 87, 101, 110),
        ),  # Orin and Thor lack code
        ((80, 86, 89, 90, 100, 120), (80, 120), (80, 86, 87, 89, 90, 100, 101, 110, 121), (75,)),
        ((89,), (), (89,), (80, 86, 90)),
        ((87,), (), (87,), (86, 89)),
    ],
)
def test_what_runs_where(cubins, ptx, runs, not_):
    code = MachineCode(cubins, ptx)
    assert [each for each in runs if not code.runs_on(each)] == []
    assert [each for each in not_ if code.runs_on(each)] == []


def test_a_card_without_code_is_refused_with_what_there_is(tmp_path):
    path = library(tmp_path, fat_binary((2, 89, b"c"), (1, 120, b"p")))
    check_card(path, "one", "sm89")
    with pytest.raises(
        BackendError, match=r"no code that this GPU \(sm90\) runs: it has sm_89, PTX of 120\. .* CUDAARCHS=90 make plugin"
    ):
        check_card(path, "one", "sm90")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_library_of_nvcc(tmp_path):
    (tmp_path / "k.cu").write_text("__global__ void k(float* x) { *x = 1; }\n")
    codes = ("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90")
    made = tmp_path / "k.so"
    done = subprocess.run(
        ["nvcc", "-shared", "-Xcompiler", "-fPIC", *codes, "k.cu", "-o", made], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = machine_code(made)
    assert {80, 90} <= set(found.cubins)
    assert 80 in found.ptx
