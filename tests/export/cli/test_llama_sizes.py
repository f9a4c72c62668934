"""The sizes of Llama 3.2 Vision on the command line: what they are made of, and what a build would take."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flamingo_export.pipeline import plan


@pytest.mark.parametrize(("size", "layers", "width", "gated"), [("11b", 32, 4096, 8), ("90b", 80, 8192, 20)])
def test_inspect(cli, size, layers, width, gated):
    found = cli("inspect", "--size", f"llama-3.2-{size}-vision").out
    assert "560x560 pixels to 1601 positions of 7680, an image is 1 to 4 of them" in found
    assert f"a projector to 1601 latents of {width} a medium" in found
    assert f"{gated} gated layers, one in 4" in found
    assert f"{layers} layers of {width}" in found
    assert "128256 (8 more that are only read)" in found.replace("\n", " ")


@pytest.mark.parametrize(("size", "policy", "least", "most"), [("11b", "--int4", 7.0, 8.5), ("90b", "--fp8", 82.0, 88.0)])
def test_plan(cli, tmp_path, monkeypatch, size, policy, least, most):
    """Weights in GiB; nothing is written."""
    monkeypatch.setattr("flamingo_export.pipeline.plan.shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 38)
    out = tmp_path / "llama.bundle"
    found = json.loads(cli("build", "--size", f"llama-3.2-{size}-vision", policy, "--plan", "--json", "--out", out).out)
    assert least < found["weight_bytes"] / (1 << 30) < most
    assert not out.exists()
