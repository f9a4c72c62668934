"""Bundles that earlier versions built open, give the answers they gave, and are said what they lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

import flamingo_export
from flamingo_export.bundle.earlier import completed, lacking
from flamingo_export.bundle.manifest import EngineRecord, read_manifest, write_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.cli import main
from flamingo_export.validate import check_bundle
from flamingo_reference.input_format import PAPER
from tests.export.bundle.bundle_of_0_1_0 import ROOT, unpack

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano bundle as 0.1.0's own code built it (commit a94ad39: build --size nano)."""
    return unpack(tmp_path_factory.mktemp("earlier") / "nano.bundle")


def test_it_opens_with_every_digest_right(nano):
    assert open_bundle(nano).tools["flamingo-export"] == "0.1.0"
    assert lacking(nano, read_manifest(nano)) == ()


def test_it_gives_its_golden_answers(nano, tmp_path):
    bundle = tmp_path / "nano.bundle"
    shutil.copytree(nano, bundle)  # parity writes its report
    report = check_bundle(bundle, backend="onnxruntime", against="golden")
    gates = [row for row in report.rows if row.limit is not None]
    assert report.verdict == "passed"
    assert len(gates) >= 57


def test_it_answers_as_0_1_0_did(nano):
    """What 0.1.0's own code printed for these, on the day it was built."""
    with flamingo_export.load(nano, threads=1) as model:
        assert model.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=3).text == "two green triangles"
        assert model.generate("<image>Output:", videos=[EXAMPLES / "clip.gif"]).text == "a white square moving down"
        shots = flamingo_export.read_shots(EXAMPLES / "shots.jsonl")
        asked = flamingo_export.qa_prompt(shots, "What colour is the square?", EXAMPLES / "q.png")
        assert model.generate(asked).text == "purple"


@pytest.fixture
def idefics(nano, tmp_path) -> Path:
    """With a token around images, as IDEFICS has it, and, as 0.1.0 wrote it, no list of tokens that are never generated."""
    bundle = tmp_path / "idefics.bundle"
    shutil.copytree(nano, bundle)
    tags = msgspec.structs.replace(PAPER.tags, around_image="<PAD>")
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle), inputs=msgspec.structs.replace(PAPER, tags=tags)))
    return bundle


def test_what_it_lacks_is_said_with_the_command_that_builds_it_again(idefics, capsys):
    assert main(["inspect", str(idefics)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "<PAD> is not recorded as never generated" in shown
    assert "flamingo-export build --size nano --storage fp32 --max-length 2048" in shown
    assert f"--backend onnxruntime --out {idefics} --overwrite" in shown
    assert main(["inspect", str(idefics), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["lacks"]) == 1


def test_engines_that_lack_it_are_named(idefics):
    manifest = read_manifest(idefics)
    engine = EngineRecord(graph="decoder", backend="tensorrt-rtx", target="sm89", tool_version="1.7.1", file="decoder.engine")
    said = lacking(idefics, msgspec.structs.replace(manifest, engines=(engine,)))
    assert len(said) == 2
    assert "the whole vocabulary's logits are read at each step" in said[1]


def test_a_bundle_of_today_lacks_nothing(idefics):
    assert lacking(idefics, completed(idefics, read_manifest(idefics))) == ()
