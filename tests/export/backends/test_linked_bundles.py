"""Bundles made of links, as model hubs and data stores lay them out: they run, and give what the plain bundle gives."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.external_data import loadable
from flamingo_export.backends.onnxruntime import OnnxRuntimeBackend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.errors import BundleError
from flamingo_reference.config import ModelConfig

FRAMES = np.linspace(-1, 1, 3 * 24 * 24, dtype=np.float32).reshape(1, 3, 24, 24)


def hub(bundle: Path, root: Path) -> Path:
    """Hugging Face's cache: `snapshots/REVISION` is a folder of relative links into `blobs`."""
    return relinked(bundle, root / "snapshots" / "abc", lambda digest: root / "blobs" / digest, relative=True)


def dvc(bundle: Path, root: Path) -> Path:
    """DVC with `cache.type symlink`: each file is an absolute link, into folders by the first two digits of its digest."""
    return relinked(
        bundle, root / "b.bundle", lambda digest: root / ".dvc" / "cache" / "files" / digest[:2] / digest[2:], relative=False
    )


def hard(bundle: Path, root: Path) -> Path:
    """`cp -l`."""
    return Path(shutil.copytree(bundle, root / "b.bundle", copy_function=os.link))


def linked_weights(bundle: Path, root: Path) -> Path:
    """The folder of weights on another disk."""
    shutil.copytree(bundle, root / "b.bundle")
    (root / "b.bundle" / "weights").rename(root / "weights")
    (root / "b.bundle" / "weights").symlink_to(root / "weights")
    return root / "b.bundle"


def relinked(bundle: Path, to: Path, blob: Callable[[str], Path], *, relative: bool) -> Path:
    for path in bundle.rglob("*"):
        if not path.is_file():
            continue
        link = to / path.relative_to(bundle)
        target = blob(hashlib.sha256(path.read_bytes()).hexdigest())
        for folder in (link.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        link.symlink_to(os.path.relpath(target, link.parent) if relative else target)
    return to


def features(bundle: Path) -> np.ndarray:
    manifest = open_bundle(bundle)
    options = SessionOptions(threads=1)
    session = OnnxRuntimeBackend().open(bundle, manifest, manifest.graph("vision_encoder"), options)
    try:
        return session.run({"pixels": FRAMES})["features"]
    finally:
        session.close()


@pytest.mark.parametrize("layout", [hub, dvc, hard, linked_weights])
def test_a_bundle_of_links_gives_what_the_plain_one_gives(
    layout: Callable[[Path, Path], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    linked = layout(tiny_bundle, tmp_path / "there")
    np.testing.assert_array_equal(features(linked), features(tiny_bundle))
    for graph in read_manifest(linked).graphs:  # every graph opens, the decoder with its tables that are given cut as well
        OnnxRuntimeBackend().open(linked, read_manifest(linked), graph, SessionOptions(threads=1)).close()


@pytest.mark.parametrize("layout", [hub, dvc, linked_weights])
def test_polygraphy_runs_a_bundle_of_links(layout: Callable[[Path, Path], Path], tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    from flamingo_export.validate.polygraphy_check import PolygraphyBackend

    linked = layout(tiny_bundle, tmp_path / "there")
    manifest = open_bundle(linked)
    session = PolygraphyBackend().open(linked, manifest, manifest.graph("vision_encoder"), SessionOptions(threads=1))
    np.testing.assert_allclose(session.run({"pixels": FRAMES})["features"], features(tiny_bundle), atol=1e-6)
    session.close()


def test_a_plain_bundle_is_opened_by_its_path(tiny_bundle: Path, tmp_path: Path) -> None:
    graph = tiny_bundle / "vision_encoder.onnx"
    assert loadable(tiny_bundle, graph) == (graph, None)
    (tmp_path / "b.bundle").symlink_to(tiny_bundle)  # reached through a link it is as plain
    assert loadable(tmp_path / "b.bundle", tmp_path / "b.bundle" / graph.name)[1] is None


@pytest.mark.parametrize("location", ["/etc/hostname", "../secret", "weights/../../secret", "manifest.json"])
def test_a_graph_reads_the_bundles_weights_and_nothing_else(location: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Where links are followed, ONNX Runtime's own check that paths stay below the graph's folder is ours to make."""
    linked = hub(tiny_bundle, tmp_path / "there")
    (linked.parent / "secret").write_bytes(bytes(1000))
    model = onnx.load(linked / "vision_encoder.onnx", load_external_data=False)
    next(
        entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    ).value = location
    (linked / "vision_encoder.onnx").unlink()
    (linked / "vision_encoder.onnx").write_bytes(model.SerializeToString())
    manifest = read_manifest(linked)
    with pytest.raises(BundleError, match="which is not among the bundle's weights"):
        OnnxRuntimeBackend().open(linked, manifest, manifest.graph("vision_encoder"), SessionOptions(threads=1))


def test_a_linked_graph_that_cannot_be_parsed(tiny_bundle: Path, tmp_path: Path, tiny_config: ModelConfig) -> None:
    linked = dvc(tiny_bundle, tmp_path / "there")
    (linked / "resampler.onnx").unlink()
    (linked / "resampler.onnx").write_bytes(b"not a graph")
    manifest = read_manifest(linked)
    with pytest.raises(BundleError, match=r"resampler\.onnx cannot be read"):
        OnnxRuntimeBackend().open(linked, manifest, manifest.graph("resampler"), SessionOptions(threads=1))
