"""Parity on engines: whole subgraphs and token traces, by the same command as for ONNX Runtime. The GPU and TensorRT are fakes."""

from __future__ import annotations

import msgspec
import pytest
from fake_gpu import add_engines, install

import flamingo_export
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.sources.choice import source_for_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bounds", "parts"),
    [({"chunk": 128}, 1), ({"chunk": 128}, 3), ({"chunk": 16, "chunk_media": 5, "batch": 2}, 1)],
    ids=["wide", "in parts", "narrow"],
)
def test_nano_passes_but_for_layers_which_have_no_engines(bounds, parts, monkeypatch, tmp_path, capfd):
    """Narrow: cases of 32 images, 65 positions and 3 requests go through engines that take less of each at once."""
    from flamingo_export.cli import main

    limits = ShapeLimits(max_length=512, **bounds)
    flamingo_export.build(source_for_size("nano"), out=tmp_path / "nano.bundle", limits=limits, parts=parts, parity="skip")
    gpu = install(monkeypatch, tmp_path)
    # A trace has few steps alike: captured the first time, as many as can be are launched.
    monkeypatch.setattr("flamingo_export.backends.tensorrt.session.CAPTURED_AT", 1)
    bundle = add_engines(tmp_path / "nano.bundle", tmp_path / "x.bundle")
    assert main(["parity", str(bundle), "--backend", "tensorrt-rtx", "--json"]) == 0
    report = msgspec.json.decode(capfd.readouterr().out)
    text = msgspec.json.encode(report).decode()
    assert "layer by layer" in text
    assert "none of single layers" in text
    assert gpu.cuda.calls["launch"] > 50  # token traces ran as captured steps
