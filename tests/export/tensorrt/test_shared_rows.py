"""Requests that share a row on engines: the profile for it is used, its bounds are kept, engines of earlier bundles copy. The GPU is a fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import add_engines, install

import flamingo_export
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request
from flamingo_export.sources.choice import source_for_size

SHOTS = "<image>Output: a large red square and two small green circles<EOC><image>Output: three blue squares<EOC>"


def requests() -> list[Request]:
    """The same shot before images of their own."""
    rng = np.random.default_rng(0)
    first, second, *own = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    return [Request(prompt=f"{SHOTS}<image>Output:", media=[first, second, picture]) for picture in own]


def answered(model: flamingo_export.Model, together: bool) -> list[tuple[int, ...]]:
    """Token ids of each answer, all side by side or one after the other."""
    options = GenerateOptions(beams=2, max_new_tokens=8)
    found = []
    for group in [requests()] if together else [[request] for request in requests()]:
        tickets = [model.engine.submit(model.prepare(request), options, wake=False) for request in group]
        found += [outcome.hypotheses[0].token_ids for outcome in model.engine.complete(*tickets)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bounds", "sharing"),
    [({"branches": 12, "branch_media": 6}, 5), ({"branches": 4, "branch_media": 6}, 4), ({"branches": 12, "branch_media": 2}, 4), ({}, 0)],
    ids=["all in one row", "two in a row", "two media in a row", "as before"],
)  # fmt: skip
def test_requests_with_the_same_shots(
    bounds: dict[str, int], sharing: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flamingo_export.runtime.cache.COMPUTED", 0)
    limits = ShapeLimits(max_length=512, chunk=64, bank_rows=16, **bounds)
    flamingo_export.build(source_for_size("nano"), out=tmp_path / "nano.bundle", limits=limits, parity="skip")
    install(monkeypatch, tmp_path)
    bundle = add_engines(tmp_path / "nano.bundle", tmp_path / "x.bundle")
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        decoder: Any = model.engines.decoder
        names = [profile.name for profile in decoder._contract.profiles]
        assert ("decode.shared" in names) == bool(bounds)
        found = answered(model, together=True)
        assert model.engine.stats().shared_rows == sharing
        used = {names[call.profile] for call in decoder._calls.values()}
        assert ("decode.shared" in used) == bool(bounds)
        for call in decoder._calls.values():
            if names[call.profile].startswith("decode"):
                assert call.shapes["token_ids"][1] <= max(limits.branches, limits.beams)
                assert call.shapes["media_rows"][1] <= limits.branch_media
    with flamingo_export.load(tmp_path / "nano.bundle", threads=1) as alone:
        assert found == answered(alone, together=False)
