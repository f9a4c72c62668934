"""Bundles that are not what they should be: their manifest, graphs and weights, with digests that are wrong and digests that fit."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import flamingo_export
from flamingo_export.bundle.manifest import MANIFEST_NAME
from flamingo_export.cli import main

from mutations import fuzz, mutated, mutated_json, mutated_json_text, mutated_safetensors  # isort: skip

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from tests.fuzz.conftest import Copy

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def asked(bundle: Path) -> None:
    with flamingo_export.load(bundle, threads=1) as model:
        model.generate("<image>Output:", images=[PICTURE], max_new_tokens=2, beams=1)


def with_digest(manifest: bytes, name: str, content: bytes) -> bytes:
    """The manifest with size and digest of one file."""
    raw = json.loads(manifest)
    for record in raw["files"]:
        if record["path"] == name:
            record |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(raw).encode()


def test_manifests(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    whole = json.loads((bundle / MANIFEST_NAME).read_bytes())

    def case(rng: random.Random) -> None:
        asked(with_file(bundle, tmp_path / "b", MANIFEST_NAME, mutated_json_text(whole, rng)))

    fuzz("manifest", 150, case)


def test_manifest_sections(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    """What a model is and how it is run: few of the manifest's values, which random changes seldom meet."""
    whole = json.loads((bundle / MANIFEST_NAME).read_bytes())

    def case(rng: random.Random) -> None:
        section = rng.choice(("config", "limits", "precision", "inputs", "graphs", "source"))
        changed = whole | {section: mutated_json(whole[section], rng)}
        asked(with_file(bundle, tmp_path / "b", MANIFEST_NAME, json.dumps(changed).encode()))

    fuzz("manifest section", 120, case)


@pytest.mark.parametrize("fitting", [False, True], ids=["wrong digests", "digests that fit"])
def test_files(bundle: Path, tmp_path: Path, with_file: Copy, fitting: bool) -> None:
    manifest = (bundle / MANIFEST_NAME).read_bytes()
    names = [record["path"] for record in json.loads(manifest)["files"]]

    def case(rng: random.Random) -> None:
        name = rng.choice(names if rng.random() < 0.8 else ["tokenizer/tokenizer.json"])
        whole = (bundle / name).read_bytes()
        content = mutated_json_text(json.loads(whole), rng) if name.endswith(".json") else mutated(whole, rng)
        if name.endswith(".safetensors"):
            content = mutated_safetensors(whole, rng)
        changed = with_file(bundle, tmp_path / "b", name, content)
        if fitting:
            (changed / MANIFEST_NAME).unlink()
            (changed / MANIFEST_NAME).write_bytes(with_digest(manifest, name, content))
        asked(changed)

    fuzz(f"bundle files {fitting}", 90 if fitting else 20, case, answers=fitting)


def test_inspect(bundle: Path, tmp_path: Path, with_file: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((bundle / MANIFEST_NAME).read_bytes())

    def case(rng: random.Random) -> None:
        changed = with_file(bundle, tmp_path / "b", MANIFEST_NAME, json.dumps(mutated_json(whole, rng)).encode())
        code = main(["inspect", str(changed), *rng.choice(([], ["--json"]))])
        printed = capsys.readouterr()
        assert code in (0, 1)
        assert "This is a bug" not in printed.err, printed.err

    fuzz("inspect", 20, case, refusals=False)
