"""The kernels' own code on the CPU against an fp64 oracle, and proof that this emulation notices what would go wrong."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from gpu import kernel_build

pytestmark = pytest.mark.skipif(kernel_build.find_compiler() is None, reason="no C++ compiler (g++)")


@pytest.mark.slow
def test_layout(tmp_path):
    done = subprocess.run(
        [kernel_build.build_emulation(tmp_path, "test_layout", flags=["-O0"])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_shape_against_the_oracle(tmp_path):
    program = kernel_build.build_emulation(tmp_path, "test_blocks", flags=["-O1"])
    done = subprocess.run([program, "11", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "34 cases" in done.stdout


@pytest.mark.slow
def test_every_range_shape_against_the_oracle(tmp_path):
    program = kernel_build.build_emulation(tmp_path, "test_range", flags=["-O1"])
    done = subprocess.run([program, "11", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "24 cases" in done.stdout


MUTANTS = {
    "no barrier before the next keys": ("m.sync();  // K has been read", "", "race|under way"),
    "no barrier after the values": ("m.sync();  // V is there", "", "under way|race|before it is written"),
    "chunks not permuted": ("(chunk ^ (row / (8 / period) % period))", "chunk", "rows meet in a bank"),
    "runs one too long": (
        "row_in_tile(half) < item.run.stop",
        "row_in_tile(half) <= item.run.stop",
        "written twice|outside of the result|fp64|should be",
    ),
}
RANGE_MUTANTS = {
    "no barrier before the next keys": ("m.sync();  // the keys have been read", "", "race|under way"),
    "a medium that one position sees is seen by its tile": (
        "present.medium <= range[half].last",
        "present.medium <= hi",
        "should be|without a medium is not zero",
    ),
    "shares of splits not weighed": (
        "total += weight * m.load_f32(statistics + 1)",
        "total += m.load_f32(statistics + 1)",
        "should be",
    ),
    "heads of keys taken one after the other": (
        "row / group) * args.heads + head * group",
        "row / group) * args.heads + head",
        "twice|should be",
    ),
    "splits overlap": ("begin = split * each", "begin = split * (each - 1)", "should be"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_emulation_notices(mutant, tmp_path):
    """Each mutant changes one line of the kernels; cases of one shape suffice to see it."""
    assert_noticed("test_blocks", MUTANTS[mutant], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", RANGE_MUTANTS)
def test_emulation_notices_in_ranges(mutant, tmp_path):
    assert_noticed("test_range", RANGE_MUTANTS[mutant], tmp_path)


def assert_noticed(tests, mutant, tmp_path):
    line, instead, complaint = mutant
    kernels = tmp_path / "kernels"
    shutil.copytree(kernel_build.KERNELS, kernels)
    sources = [path for path in kernels.glob("*.h") if line in path.read_text()]
    assert len(sources) == 1, f"{line!r} is to be in one header"
    sources[0].write_text(sources[0].read_text().replace(line, instead))
    program = kernel_build.build_emulation(tmp_path, tests, kernels=kernels, flags=["-O0", "-DONE_SHAPE"])
    done = subprocess.run([program, "1", "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert any(part in done.stdout for part in complaint.split("|")), done.stdout
