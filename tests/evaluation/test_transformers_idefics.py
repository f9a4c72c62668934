"""The original beside the bundle: transformers' IDEFICS asked the same items, the same answers and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

from idefics_models import their_config, their_model
from published_files import write_tokenizer

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.bundles import BundleModel
from flamingo_export.evaluation.transformers_idefics import TransformersIdefics
from flamingo_export.runtime.prompts import Shot, caption_prompt

WORDS = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, 60)), "<fake_token_around_image>", "<image>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("hub") / "idefics-tiny"
    config = their_config(vector=True)
    config.max_position_embeddings = 256
    their_model(config, seed=3).float().save_pretrained(folder)
    write_tokenizer(folder, WORDS, SPECIAL)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flamingo_export.build(checkpoint, out=tmp_path_factory.mktemp("b") / "i.bundle", parity="skip").path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append({"id": number, "image": f"{number}.png", "question": f"w{number + 10} w4", "answer": f"w{number + 20}"})
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "t.toml").write_text('metric = "exact"\nsupport = "t.jsonl"\nmax_new_tokens = 4\n')
    return tmp_path


def test_texts_and_scores_are_the_bundles(checkpoint: Path, bundle: Path, data: Path) -> None:
    theirs = TransformersIdefics(checkpoint)
    shots = [Shot(answer="w30 w31", medium=data / "0.png"), Shot(answer="w32", medium=data / "1.png")]
    with flamingo_export.load(bundle) as model:
        ours = BundleModel(model)
        assert ours.inputs == theirs.inputs
        requests = [caption_prompt(shots, data / "2.png", ours.inputs), caption_prompt([], data / "3.png", ours.inputs)]
        for beams in (1, 3):
            one, other = (each.generate(requests, beams=beams, max_new_tokens=6) for each in (ours, theirs))
            assert [each.token_ids for each in one] == [each.token_ids for each in other]
            assert [each.text for each in one] == [each.text for each in other]
            for mine, their in zip(one, other, strict=True):
                np.testing.assert_allclose(mine.token_logprobs, their.token_logprobs, atol=2e-4)
        choices = [["w5", "w6 w7", "w8"], ["w9", "w5 w5 w5"]]
        for scores, wanted in zip(ours.score(requests, choices), theirs.score(requests, choices), strict=True):
            np.testing.assert_allclose(scores, wanted, atol=2e-4)


@pytest.mark.slow
def test_the_command_compares_them_pair_by_pair(
    checkpoint: Path, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(bundle), "--against", str(checkpoint), "--task", str(data / "t.toml"), "--data", str(data / "t.jsonl")]
    assert main([*line, "--shots", "0,2", "--out", str(data / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["backend"].startswith("transformers ")
    assert [cell["changed"] for cell in found["cells"]] == [0, 0]
    assert [cell["difference"] for cell in found["cells"]] == [0, 0]


def test_another_family_is_refused(tmp_path: Path) -> None:
    from flamingo_export.sources.choice import nano_checkpoint

    with pytest.raises(EvaluationError, match="transformers evaluates IDEFICS checkpoints"):
        TransformersIdefics(nano_checkpoint())
