"""The generators: seeded, the splits apart, texts that fit what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flamingo_reference.nano import pictures
from flamingo_reference.nano.examples import write_examples

EXAMPLES = Path(__file__).parents[3] / "examples"


def scene_key(item: pictures.Item) -> tuple[str, ...]:
    return tuple(sorted(item.description.split(", ")))


@pytest.mark.parametrize("make", [pictures.scene, pictures.digit, pictures.video])
def test_an_item_follows_from_its_seed(make):
    first, again, other = (make(seed, split="train") for seed in (5, 5, 6))
    assert first.caption == again.caption
    assert first.questions == again.questions
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, again.frames, strict=True))
    assert not np.array_equal(first.frames[0], other.frames[0])


def test_frames_are_rgb_of_the_models_size():
    for item in (pictures.scene(1, split="test"), pictures.digit(1, split="test"), pictures.video(1, split="test")):
        for frame in item.frames:
            assert frame.shape == (64, 64, 3)
            assert frame.dtype == np.uint8


@pytest.mark.slow
def test_splits_share_no_scene_no_scan_and_no_motion():
    train = {scene_key(pictures.scene(seed, split="train")) for seed in range(1500)}
    test = {scene_key(pictures.scene(seed, split="test")) for seed in range(1500)}
    assert not train & test
    assert not set(pictures.scan_indices("train")) & set(pictures.scan_indices("test"))
    assert len(pictures.scan_indices("train")) + len(pictures.scan_indices("test")) == 1797
    for seed in range(50):
        item = pictures.digit(seed, split="test")
        assert item.caption == f"the digit {pictures.NUMBERS[int(item.formats['numeral'])]}"


def test_texts_agree_with_what_is_drawn():
    for seed in range(200):
        item = pictures.scene(seed, split="train")
        things = [text.split() for text in item.description.split(", ")]
        assert item.num_objects == len(things)
        assert dict(item.questions)["How many shapes are there?"] == pictures.NUMBERS[len(things)]
        for _, colour, shape, *_ in things:
            assert colour in item.caption
            assert shape in item.caption


def test_colours_are_where_the_description_says():
    """Independent of the drawing code: the pixel in the middle of the named cell has the named colour."""
    for seed in range(60):
        item = pictures.scene(seed, split="train", num_groups=1)
        for text in item.description.split(", "):
            _, colour, _, *place = text.split()
            row, column = divmod(pictures.PLACES.index(" ".join(place)), 3)
            centre = item.frames[0][int(32 + (row - 1) * 20.5), int(32 + (column - 1) * 20.5)].astype(int)
            assert np.abs(centre - np.array(pictures.COLOURS[colour])).max() < 40, item.description


def test_a_hard_negative_differs_in_one_attribute_of_one_thing():
    rng = np.random.default_rng(0)
    for _ in range(100):
        things = pictures.draw_things(rng, num_groups=2, split="train")
        varied = pictures.vary(rng, things)
        changed = [(a, b) for a, b in zip(things, varied, strict=True) if a != b]
        assert len(changed) == 1
        before, after = changed[0]
        assert sum(getattr(before, field) != getattr(after, field) for field in ("shape", "colour", "large", "cell")) == 1


@pytest.mark.parametrize(("direction", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_a_video_moves_as_its_caption_says(direction, axis, sign):
    for seed in range(200):
        item = pictures.video(seed, split="train", num_frames=6)
        if not item.caption.endswith(direction):
            continue
        centres = []
        for frame in item.frames:
            bright = np.abs(frame.astype(int) - frame[0, 0].astype(int)).max(axis=2) > 60
            centres.append(np.argwhere(bright).mean(axis=0)[axis])
        steps = np.diff(centres) * sign
        assert (steps > 1).all()


def test_examples_are_what_the_command_writes(tmp_path):
    write_examples(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    shipped = sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*") if path.is_file())
    # Scripts, and the task of its own that docs/evaluation.md shows, are written by hand.
    by_hand = [path for path in shipped if path.suffix in (".py", ".pyc") or path.parts[0] == "tasks"]
    assert written == [path for path in shipped if path not in by_hand]
    for path in written:
        if path.suffix == ".jsonl":
            assert (tmp_path / path).read_text() == (EXAMPLES / path).read_text()
        else:
            with Image.open(tmp_path / path) as made, Image.open(EXAMPLES / path) as kept:
                assert np.array_equal(np.asarray(made.convert("RGB")), np.asarray(kept.convert("RGB")))


def test_examples_are_held_out_where_they_say_so():
    truths = [json.loads(line) for line in (EXAMPLES / "truth_captions.jsonl").read_text().splitlines()]
    assert sum(truth["caption"].startswith("a ") and " and " not in truth["caption"] for truth in truths) == len(truths) / 2
    assert len({truth["image"] for truth in truths}) == len(truths)
