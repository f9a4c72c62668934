"""`flamingo-export calibrate` from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flamingo_export.sources import CheckpointSource
from flamingo_export.sources.choice import nano_checkpoint
from flamingo_export.sources.origin import source_digest
from flamingo_export.weights.calibration_table import calibrated_tensors, check_fits, read_table
from flamingo_reference.config import NANO


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `flamingo-export calibrate` with these arguments."""
    from flamingo_export.cli import main

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main(["calibrate", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Nano's checkpoint as a user has one: a folder of their own."""
    folder = tmp_path / "ckpt"
    shutil.copytree(nano_checkpoint(), folder, ignore=shutil.ignore_patterns("golden"))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    lines = []
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        text = "<image>Output: a red square and two blue circles<EOC><image>Output: a large yellow cross beside three small green triangles<EOC>"
        lines.append(json.dumps({"prompt": text, "images": [f"{index}.png", "0.png"]}))
    (tmp_path / "calib.jsonl").write_text("\n".join(lines))
    return tmp_path / "calib.jsonl"


@pytest.mark.slow
def test_a_checkpoint_on_a_file(cli, checkpoint, data, tmp_path):
    out = tmp_path / "calibration.json"
    done = cli("--checkpoint", checkpoint, "--data", data, "--out", out, "--method", "mse")
    assert done.code == 0, done.err
    table = read_table(out)
    assert (table.model, table.method, table.samples, table.images) == ("nano", "mse", 12, 24)
    source = CheckpointSource(checkpoint)
    check_fits(table, source.config, source_digest(source))
    assert set(table.tensors) == set(calibrated_tensors(source.config)) > set(calibrated_tensors(NANO))  # its towers' too
    assert f"{len(table.tensors)} tensors from 12 samples with {table.tokens} tokens and 24 images, method mse" in done.out
    assert "calibrating" in done.err
    assert {path.name for path in tmp_path.glob(".calibration*")} == set()
    # There is something at --out now.
    again = cli("--checkpoint", checkpoint, "--data", data, "--out", out)
    assert (again.code, again.out) == (1, "")
    assert "exists. Choose another --out, or replace it with --overwrite" in again.err
    before = out.read_bytes()
    assert cli("--checkpoint", checkpoint, "--data", data, "--out", out, "--method", "mse", "--overwrite").code == 0
    assert out.read_bytes() == before


@pytest.mark.slow
def test_bad_lines(cli, data, tmp_path):
    data.write_text(data.read_text() + '\n{"prompt": "<image>x", "images": ["gone.png"]}\nnothing')
    out = tmp_path / "calibration.json"
    failed = cli("--size", "nano", "--data", data, "--out", out)
    assert failed.code == 1
    assert "2 of 14 samples cannot be used: line 13:" in failed.err
    assert "line 14: not JSON" in failed.err
    assert not out.exists()
    done = cli("--size", "nano", "--data", data, "--out", out, "--skip-bad")
    assert done.code == 0
    assert "12 samples (2 left out)" in done.out
    assert "2 of 14 samples were left out: line 13" in done.err


@pytest.mark.slow
def test_the_shipped_set_as_json(cli, tmp_path):
    done = cli("--size", "nano", "--seed", 1, "--out", tmp_path / "x.json", "--json")
    told = json.loads(done.out)
    table = read_table(tmp_path / "x.json")
    assert told["weights_sha256"] == table.weights_sha256
    assert (told["tensors"], told["skipped"], told["tokens"]) == (78, 0, table.tokens)
    assert set(table.tensors) == set(calibrated_tensors(NANO))


@pytest.mark.slow
def test_nano_pages(cli, tmp_path):
    done = cli("--size", "nano", "--data", "nano", "--out", tmp_path / "x.json")
    assert done.code == 0, done.err
    assert "64 samples" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --size or --checkpoint"),
        (["--size", "nano", "--checkpoint", "x"], "either --size or --checkpoint"),
        (["--size", "4b"], "is not a size"),
        (["--size", "nano", "--lm", "x"], "add --checkpoint"),
        (["--checkpoint", "x", "--seed", "1"], "a checkpoint has its weights"),
        (["--size", "nano", "--method", "guess"], "guess"),
    ],
)
def test_usage(cli, arguments, message):
    done = cli(*arguments)
    assert done.code == 2
    assert message in done.err


def test_failures_of_one_line(cli, tmp_path):
    for arguments, message in (
        (["--size", "nano", "--data", tmp_path / "none.jsonl"], "none.jsonl cannot be read"),
        (["--checkpoint", tmp_path / "none"], "none"),
        (["--size", "nano", "--out", tmp_path], "exists"),
    ):
        done = cli(*arguments, *([] if "--out" in arguments else ["--out", tmp_path / "x.json"]))
        assert done.code == 1
        assert message in done.err
        assert "Traceback" not in done.err
        assert len(done.err.strip().splitlines()) == 1


def test_without_torch_it_says_so(tmp_path):
    """And the package is imported without it."""
    script = """
import sys
sys.modules["torch"] = None
import flamingo_calibration
from flamingo_export.cli import main
sys.exit(main(["calibrate", "--size", "nano", "--out", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "calibration runs the PyTorch reference. Install it: pip install '.[torch]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
