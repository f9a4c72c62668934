"""The shipped nano from build to answers: parity of its towers, golden values without PyTorch, labels and words on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.cli import main
from flamingo_export.evaluation.index.encoder import EMBEDDINGS
from flamingo_export.evaluation.index.store import Index
from flamingo_export.sources.choice import source_for_size
from flamingo_export.sources.origin import find_origin
from flamingo_export.validate import check_bundle

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("nano") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=out, parity="skip")
    return out


@pytest.mark.slow
def test_towers_pass_against_shipped_golden_values_and_the_reference(nano: Path) -> None:
    for against in ("golden", "reference"):
        report = check_bundle(nano, against=against)
        assert report.verdict == "passed"
        measured = {(row.subgraph, row.tensor) for row in report.rows if row.level == "subgraph" and row.passed}
        assert {
            ("vision_encoder", "pooled"),
            ("image_tower", "image_embedding"),
            ("text_tower", "text_embedding"),
        } <= measured


def test_the_bundle_is_known_as_nanos(nano: Path) -> None:
    manifest = read_manifest(nano)
    assert manifest.config.contrastive is not None
    assert find_origin(manifest).config == manifest.config
    assert [graph.name for graph in manifest.graphs] == [
        "vision_encoder",
        "resampler",
        "media_kv",
        "image_tower",
        "text_tower",
        "decoder",
    ]


def test_labels(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = "a red circle,two green triangles,three green triangles,two blue triangles"
    assert main(["classify", str(nano), "--image", str(EXAMPLES / "a.png"), "--labels", labels, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["labels"][0]["label"] == "two green triangles"
    assert found["labels"][0]["probability"] > 0.5


def test_an_index_by_words_and_shots_by_likeness(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "index"
    assert main(["index", str(nano), "--data", str(EXAMPLES / "shots.jsonl"), "--out", str(index)]) == 0
    assert Index(index).record.features == EMBEDDINGS
    items = Index(index).items()
    for faiss in ([], ["--faiss"]):
        capsys.readouterr()
        assert main(["search", str(nano), "--index", str(index), "--text", "a red circle", "--json", *faiss]) == 0
        assert len(json.loads(capsys.readouterr().out)) == min(10, len(items))
    picture = EXAMPLES / "q.png"
    question = "What colour is the square?"
    assert (
        main(
            [
                "generate",
                str(nano),
                "--shots-from",
                str(index),
                "--num-shots",
                "1",
                "--image",
                str(picture),
                "--question",
                question,
            ]
        )
        == 0
    )
    assert "purple" in capsys.readouterr().out
