"""Things deliberately wrong: each must fail parity, by name. Tolerances that let one of these through would be worth nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import pytest

from flamingo_export.backends.base import Session, SessionOptions
from flamingo_export.backends.onnxruntime import OnnxRuntimeBackend
from flamingo_export.bundle.manifest import GraphRecord, Manifest
from flamingo_export.runtime.tree import BeamTree
from flamingo_export.validate import ParityReport
from flamingo_export.validate.expected.cases import PHI_CASES, TREE_CASE
from flamingo_export.weights import WeightIndex
from flamingo_reference.arrays import Array

Compare = Callable[..., ParityReport]


def edit(bundle: Path, name: str, change: Callable[[Array], Array]) -> None:
    """Writes a changed tensor into a bundle's weights, in place."""
    index = WeightIndex.read(bundle)
    placed = index[name]
    values = np.array(index.read_tensor(bundle, name))
    changed = change(values).astype(values.dtype)
    assert not np.array_equal(changed, values)
    with (bundle / placed.file).open("r+b") as file:
        file.seek(placed.offset)
        file.write(changed.tobytes())


def failed_cases(report: ParityReport) -> set[str]:
    return {row.case for row in report.failures}


def failed_layers(report: ParityReport) -> set[str]:
    return {row.subgraph for row in report.failures if row.level == "layer"}


def tensor_of(bundle: Path, layer: int, part: str) -> str:
    """A tensor of the LM layer itself, not of the gated block before it."""
    prefix = f"decoder/layer.{layer}/"
    names = (name for name in WeightIndex.read(bundle) if name.startswith(prefix) and "cross_attention" not in name)
    (name,) = (name for name in names if name.endswith(part))
    return name


def test_the_unspoilt_copy_passes(copy: Path, compare: Compare) -> None:
    report = compare(copy)
    assert report.verdict == "passed", report.summary
    assert report.first_diverging_layer is None
    assert {trace.outcome for trace in report.traces} == {"equal"}


def test_weights_of_two_layers_swapped(copy: Path, compare: Compare) -> None:
    index = WeightIndex.read(copy)
    ffw = [tensor_of(copy, layer, "ffw_down") for layer in (1, 2)]
    values = [np.array(index.read_tensor(copy, name)) for name in ffw]
    edit(copy, ffw[0], lambda _: values[1])
    edit(copy, ffw[1], lambda _: values[0])
    report = compare(copy)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.1"
    assert failed_layers(report) == {"decoder/layer.1", "decoder/layer.2"}
    assert set(PHI_CASES) <= failed_cases(report)
    assert any("self-attention or feed-forward" in row.note for row in report.failures)
    assert any(row.level == "trace" for row in report.failures)


def test_a_zeroed_content_bias(copy: Path, compare: Compare) -> None:
    edit(copy, tensor_of(copy, 2, "content_bias"), np.zeros_like)
    report = compare(copy)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.2"
    assert failed_layers(report) == {"decoder/layer.2"}


def test_a_zeroed_bias_of_the_resampler(copy: Path, compare: Compare) -> None:
    edit(copy, "resampler/layer.1/latent_norm/bias", np.zeros_like)
    report = compare(copy, memory=1)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "resampler"
    assert {row.subgraph for row in report.failures if row.level == "subgraph"} == {"resampler"}


def test_a_gate_that_lost_its_sign(copy: Path, compare: Compare) -> None:
    """The second gated block, before layer 2, has a negative gate, folded into its output projection."""
    name = "decoder/layer.2/cross_attention/out_proj"
    edit(copy, name, np.negative)
    report = compare(copy)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.2"
    # Without an image the block adds nothing, so its gate does not matter: these two must still pass.
    assert failed_cases(report) & set(PHI_CASES) == set(PHI_CASES) - {"no image", "a single token"}


def test_layers_by_themselves_name_the_same_layer_when_memory_is_short(copy: Path, compare: Compare) -> None:
    edit(copy, tensor_of(copy, 1, "self_attention/out_proj"), lambda weight: weight * 1.01)
    report = compare(copy, memory=1)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.1"
    assert [item.name for item in report.not_run] == ["token traces"]
    assert all("layer by layer" in row.note for row in report.failures if row.level == "phi")


def test_nan_in_a_weight(copy: Path, compare: Compare) -> None:
    def spoil(weight: Array) -> Array:
        weight.reshape(-1)[5] = np.nan
        return weight

    edit(copy, tensor_of(copy, 0, "qkv_proj"), spoil)
    report = compare(copy, memory=1)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.0"
    assert any("NaN" in row.note for row in report.failures)


class Altered:
    """A session whose feeds are changed on the way: an engine that is wrong in what it does with them."""

    def __init__(self, session: Session, change: Callable[[dict[str, Array]], None]) -> None:
        self._session, self._change = session, change

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def run(self, feeds: Mapping[str, Array], outputs: Collection[str] | None = None) -> dict[str, Array]:
        changed = dict(feeds)
        self._change(changed)
        return self._session.run(changed, outputs)


class AlteredBackend(OnnxRuntimeBackend):
    def __init__(self, change: Callable[[dict[str, Array]], None]) -> None:
        super().__init__()
        self._change = change

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> Session:
        return Altered(super().open(bundle, manifest, graph, options), self._change)  # type: ignore[return-value]


def test_phi_off_by_one(copy: Path, compare: Compare) -> None:
    """Each token sees the image before the one it should see."""

    def change(feeds: dict[str, Array]) -> None:
        if "phi" in feeds:
            feeds["phi"] = np.maximum(feeds["phi"] - 1, 0)

    report = compare(copy, backend=AlteredBackend(change))
    assert report.verdict == "failed"
    assert failed_cases(report) & set(PHI_CASES) == set(PHI_CASES) - {"no image", "a single token"}
    # Layers 0 and 2 look at images, layer 1 does not.
    assert failed_layers(report) == {"decoder/layer.0", "decoder/layer.2"}
    assert report.first_diverging_layer == "decoder/layer.0"


def test_phi_that_counts_an_image_one_token_late(copy: Path, compare: Compare) -> None:
    """Only the `<image>` tokens themselves see the wrong medium."""

    def change(feeds: dict[str, Array]) -> None:
        if "token_ids" in feeds:
            feeds["phi"] = feeds["phi"] - (feeds["token_ids"] == 3)

    failed = failed_cases(compare(copy, backend=AlteredBackend(change)))
    assert {"image last", "adjacent images", "32 images", "chunked prefill"} <= failed
    assert "no image" not in failed


def test_distances_off_by_one(copy: Path, compare: Compare) -> None:
    def change(feeds: dict[str, Array]) -> None:
        if "key_positions" in feeds:
            feeds["key_positions"] = feeds["key_positions"] - 1

    report = compare(copy, backend=AlteredBackend(change))
    assert report.verdict == "failed"
    assert failed_layers(report) == {f"decoder/layer.{layer}" for layer in range(3)}
    # A single token sees itself first: with one key, any distance gives the same attention, but the tokens decoded after it differ.
    assert set(PHI_CASES) <= failed_cases(report)


def test_a_mask_without_ancestors(copy: Path, compare: Compare) -> None:
    """An engine that takes the beams for one sequence fails the tree, and nothing else."""

    def change(feeds: dict[str, Array]) -> None:
        mask = feeds.get("mask")
        if mask is not None and mask.shape[2] == 3 and mask.shape[0] == 1:
            feeds["mask"] = np.broadcast_to(np.logical_or.reduce(mask, axis=2, keepdims=True), mask.shape).copy()

    report = compare(copy, backend=AlteredBackend(change))
    assert failed_cases(report) & set(PHI_CASES) == {TREE_CASE}
    assert report.first_diverging_layer is None


def test_a_runtime_that_ignores_parents(copy: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of all cases are right; only the beam traces can tell."""
    right = BeamTree.step

    def wrong(self: BeamTree, parents: Array, first: int) -> None:
        right(self, np.arange(self.width), first)

    monkeypatch.setattr(BeamTree, "step", wrong)
    report = compare(copy)
    assert report.verdict == "failed"
    assert {row.level for row in report.failures} == {"trace"}
    assert all("beam 3" in row.case for row in report.failures)
    assert {trace.outcome for trace in report.traces if trace.search == "greedy"} == {"equal"}


def test_an_engine_that_raises(copy: Path, compare: Compare) -> None:
    def change(feeds: dict[str, Array]) -> None:
        if "latents" in feeds:
            raise RuntimeError("out of order")

    report = compare(copy, backend=AlteredBackend(change), memory=1)
    assert report.verdict == "not_run"
    assert not report.failures
    assert report.first_diverging_layer is None
    assert any(row.subgraph == "media_kv" and "out of order" in row.note for row in report.unmeasured)
    # What needs encoded media is not measured either, the rest is still compared.
    unmeasured = {row.case for row in report.unmeasured}
    assert "pixels to logits" in unmeasured
    assert not unmeasured & set(PHI_CASES)
    assert re.search(
        r"parity not established .*: \d+ of \d+ gates; \d+ not measured, the first: .*out of order", report.summary
    )


def test_what_failed_counts_beside_what_was_not_measured(copy: Path, compare: Compare) -> None:
    def change(feeds: dict[str, Array]) -> None:
        if "latents" in feeds:
            raise RuntimeError("out of order")
        if "phi" in feeds:
            feeds["phi"] = np.maximum(feeds["phi"] - 1, 0)

    report = compare(copy, backend=AlteredBackend(change), memory=1)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.0"
    assert report.failures
    assert report.unmeasured
    assert not set(report.failures) & set(report.unmeasured)


def test_a_damaged_graph_file(copy: Path, compare: Compare) -> None:
    (copy / "decoder.onnx").write_bytes(b"not a graph")
    report = compare(copy)
    assert report.verdict == "not_run"
    assert set(PHI_CASES) <= {row.case for row in report.unmeasured}
    assert {f"decoder/layer.{layer}" for layer in range(3)} <= {row.subgraph for row in report.unmeasured}
