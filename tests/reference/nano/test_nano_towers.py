"""Nano's contrastive encoder does what the card says, and left the model as it was."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flamingo_reference.config import NANO  # noqa: E402
from flamingo_reference.model import Flamingo  # noqa: E402
from flamingo_reference.nano import CHECKPOINT, pictures, zero_shot  # noqa: E402
from flamingo_reference.nano.heldout import heldout  # noqa: E402
from flamingo_reference.nano.towers import texts_of, training_items, with_towers  # noqa: E402
from flamingo_reference.nano.zero_shot import (  # noqa: E402
    BEGIN,
    DIGIT_LABELS,
    END,
    SCENE_LABELS,
    Encoder,
    accuracy,
    measured,
    recall,
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return Encoder(CHECKPOINT)


def test_the_models_own_file_is_the_one_that_was_trained_before() -> None:
    digest = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "6be9ebcb7ce148ef505eaa8e776e7d796015ef1bdd15c3bbef740f39d7dcdfcb"


def test_held_out_digits_and_scenes_are_told_apart(encoder: Encoder) -> None:
    """Below the card's figures by three standard errors of samples of this size."""
    digits = heldout("digit", 150)
    right = [DIGIT_LABELS.index(item.caption) for item in digits]
    assert accuracy(encoder.images(digits), encoder.texts(DIGIT_LABELS), right) >= 95
    scenes = [item for item in heldout("scene", 120) if item.num_objects == 1]
    right = [SCENE_LABELS.index(item.caption) for item in scenes]
    assert accuracy(encoder.images(scenes), encoder.texts(SCENE_LABELS), right) >= 98


def test_held_out_scenes_are_found_by_their_texts(encoder: Encoder) -> None:
    scenes = heldout("scene", 120)
    cosines = encoder.texts([item.description for item in scenes]) @ encoder.images(scenes).T
    true = np.asarray([[one.description == other.description for other in scenes] for one in scenes])
    assert recall(cosines, true, 1) >= 97
    assert recall(cosines.T, true.T, 1) >= 97
    assert recall(-cosines, true, 1) <= 5  # it can fail


def test_a_checkpoint_without_towers_is_refused(tmp_path: Path) -> None:
    Flamingo(msgspec.structs.replace(NANO, contrastive=None)).save(
        tmp_path, tokenizer=CHECKPOINT / "tokenizer" / "tokenizer.json"
    )
    with pytest.raises(ValueError, match=r"has no text tower; python -m flamingo_reference\.nano\.towers trains one"):
        Encoder(tmp_path)


@pytest.mark.parametrize("written", [False, True])
def test_the_command_prints_its_tables_and_writes_the_card_if_asked(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    (tmp_path / "MODEL_CARD.md").write_text(text)
    opened: list[Path] = []
    monkeypatch.setattr(zero_shot, "__file__", str(tmp_path / "zero_shot.py"))
    monkeypatch.setattr(zero_shot, "Encoder", opened.append)
    monkeypatch.setattr(zero_shot, "measured", lambda encoder: "| a table |")
    monkeypatch.setattr(sys, "argv", ["zero_shot", *["--card"][:written]])
    zero_shot.main()
    assert capsys.readouterr().out == "| a table |\n"
    assert opened == [tmp_path / "checkpoint"]
    assert (tmp_path / "MODEL_CARD.md").read_text() == (text.replace("old", "| a table |") if written else text)


def test_recall_by_hand() -> None:
    cosines = np.asarray([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]], np.float32)
    true = np.asarray([[True, False, False], [False, True, False]])
    assert [recall(cosines, true, rank) for rank in (1, 2, 3)] == [0, 50, 100]


@pytest.mark.slow
def test_training_items_are_of_the_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flamingo_reference.nano.towers.FAMILIES", 20)
    scenes, digits = training_items(5)
    assert len(scenes) == 20 * 6
    assert not any(pictures.is_test(sorted(item.description.split(", "))) for item in scenes)
    assert len(digits) == 3 * len(pictures.scan_indices("train"))
    assert training_items(5)[0][7].description == scenes[7].description
    assert texts_of(digits[0]) == (digits[0].caption,)
    assert len(texts_of(scenes[0])) == 2


@pytest.mark.slow
def test_the_card_has_what_the_command_measures(encoder: Encoder) -> None:
    card = (CHECKPOINT.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.split(BEGIN)[1].split(END)[0].strip() == measured(encoder)
    assert encoder.model.config == with_towers(encoder.model.config)
