"""What nano's accuracy is measured by: logits of right answers beside the reference's, their distance by hand, the recorded answers."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import flamingo_export
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources.choice import nano_checkpoint, source_for_size
from flamingo_export.validate import accuracy
from flamingo_export.validate.accuracy import Agreement, agreement, compared
from flamingo_reference.model import Flamingo
from flamingo_reference.nano.batches import to_pixels
from flamingo_reference.nano.tasks import Answers, Task, read_answers, tasks


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    return path


@torch.no_grad()
def test_logits_are_the_references_where_answers_are_chosen(nano: Path) -> None:
    items, manifest = tasks(3), read_manifest(nano)
    tokenizer = Tokenizer.open(nano, manifest.config, manifest.inputs.tags)
    model = Flamingo.from_checkpoint(nano_checkpoint()).eval()
    exact, chosen = [], []
    for item in items:
        asked, ids = (tokenizer.encode(f"<image>{item.asked}{text}") for text in ("", f" {item.expected}"))
        media = model.media_kv(model.latents(to_pixels([item.frame], model.config)[None]))
        tokens = torch.tensor([ids])
        phi = (tokens == model.config.tokens.image).long().cumsum(1)
        exact.append(model(tokens, media, torch.tensor([[0]]), phi)[0, len(asked) - 1 : -1].numpy())
        chosen += ids[len(asked) :]
    found = accuracy.logits(nano, manifest, get_backend("onnxruntime"), items)
    np.testing.assert_allclose(found, np.concatenate(exact), atol=1e-3)
    assert found.argmax(1).tolist() == chosen  # the trained model says what is right
    near = agreement(np.concatenate(exact), found)
    assert near.positions == len(chosen)
    assert near.same_choice == 1
    assert abs(near.divergence) < 1e-6


def test_agreement_by_hand() -> None:
    exact, found = (np.log(np.asarray(rows, np.float32)) for rows in ([[0.75, 0.25], [0.9, 0.1]], [[0.5, 0.5], [0.2, 0.8]]))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.9 * math.log(4.5) + 0.1 * math.log(0.125)
    one = agreement(exact, found)
    assert one.divergence == pytest.approx(divergence / 2, rel=1e-6)
    assert (one.same_choice, one.positions) == (0.5, 2)
    # Logits are known but for a number that is added to all of a position.
    assert agreement(exact + 700, found - 700).divergence == pytest.approx(divergence / 2, rel=1e-3)
    assert agreement(exact, exact) == Agreement(divergence=0.0, same_choice=1.0, positions=2)


def test_answers_are_compared_by_kind() -> None:
    frame = np.zeros((64, 64, 3), np.uint8)
    items = [
        Task(kind="question" if number % 2 else "caption", frame=frame, asked="", expected=expected)
        for number, expected in enumerate("abcd")
    ]
    found = compared(items, ["a", "x", "x", "d"], ["a", "b", "x", "d"])
    assert (found.captions, found.questions, found.compared_captions, found.compared_questions) == (1, 1, 1, 2)
    assert (found.same, found.total, found.lost_points) == (3, 4, 25)
    with pytest.raises(ValueError, match="zip"):
        compared(items, ["a"], ["a"])


def test_the_recorded_answers_are_what_the_reference_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "COUNT", 6)
    monkeypatch.setattr(accuracy, "ANSWERS", tmp_path / "answers.json")
    found, shipped = accuracy.record(), read_answers()
    assert found.said == shipped.said[:6]
    assert found.weights_sha256 == shipped.weights_sha256
    text = (tmp_path / "answers.json").read_bytes()
    assert msgspec.json.decode(text, type=Answers) == found
    assert text.endswith(b"}\n")
