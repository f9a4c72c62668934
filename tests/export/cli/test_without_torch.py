"""A machine without PyTorch builds, generates, scores, measures and inspects; what needs PyTorch says so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# sys.modules[name] = None is what Python itself takes for "cannot be imported"; importlib.util.find_spec then finds nothing either.
SCRIPT = """
import json, sys
sys.modules["torch"] = None
from flamingo_export.cli import main
image, bundle = sys.argv[1:]
codes = [
    main(line)
    for line in (
        ["build", "--size", "nano", "--seed", "1", "--out", bundle],
        ["generate", bundle, "--image", image, "--max-new-tokens", "3"],
        ["score", bundle, "--image", image, "--question", "What?", "--candidates", "a,b"],
        ["bench", bundle, "--repeat", "1", "--images", "1", "--prompt-tokens", "20", "--new-tokens", "2"],
        ["inspect", bundle],
        ["doctor"],
        ["parity", bundle],
    )
]
from flamingo_export.bundle.manifest import read_manifest
from pathlib import Path
print(json.dumps([codes, read_manifest(Path(bundle)).parity.state]))
"""


@pytest.mark.slow
def test_everything_but_parity_with_the_reference(pictures, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(pictures / "a.png"), str(tmp_path / "x.bundle")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    codes, state = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 0, 0, 0, 0, 1], done.stderr
    assert state == "not_run"
    assert "PyTorch is not installed" in done.stderr
    assert "golden" in done.stderr
