"""Writes the image files of `examples/`: `python -m flamingo_reference.nano.examples examples`.

Held-out scenes, digits and videos with what is true of them (`truth_NAME.jsonl`), and shots from the training split
(`shots_NAME.jsonl`). All are drawn from fixed seeds, none is chosen by what the model says of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec
from PIL import Image

from flamingo_reference.nano import pictures
from flamingo_reference.nano.pictures import Item

SEED = 5_000_000  # beyond the seeds that training and evaluation use
Line = dict[str, str]


def write_examples(folder: Path) -> None:
    """Writes images, clips, shots and truths into a folder, over those that are there."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)

    def captions(items: Sequence[Item], name: str) -> list[Line]:
        return [
            {"image": _save(item, images / f"{name}_{number}.png", folder), "caption": item.caption}
            for number, item in enumerate(items, start=1)
        ]

    def questions(items: Sequence[Item], name: str) -> list[Line]:
        lines = []
        for number, item in enumerate(items, start=1):
            question, answer = item.questions[number % len(item.questions)]
            path = _save(item, images / f"{name}_{number}.png", folder)
            lines.append({"image": path, "question": question, "answer": answer})
        return lines

    seeds = iter(range(SEED, SEED + 1000))
    singles = [_scene("test", next(seeds), objects=1) for _ in range(4)]
    several = [_scene("test", next(seeds), objects=objects) for objects in (2, 2, 3, 3)]
    _write_lines(folder / "truth_captions.jsonl", captions([*singles, *several], "scene"))
    _write_lines(folder / "shots_captions.jsonl", captions([_scene("train", next(seeds)) for _ in range(4)], "shot_scene"))
    _write_lines(folder / "truth_digits.jsonl", captions([_digit("test", value) for value in range(10)], "digit"))
    _write_lines(folder / "shots_digits.jsonl", captions([_digit("train", value) for value in (3, 8, 1, 6)], "shot_digit"))
    asked = [_scene("test", next(seeds), objects=objects) for objects in (1, 1, 1, 2, 2, 3)]
    _write_lines(folder / "truth_questions.jsonl", questions(asked, "question"))
    shots = questions([_scene("train", next(seeds)) for _ in range(4)], "shot_question")
    _write_lines(folder / "shots_questions.jsonl", shots)
    _write_lines(folder / "shots.jsonl", shots)

    square = next(
        item
        for item in (_scene("test", seed, objects=1) for seed in range(SEED + 2000, SEED + 3000))
        if item.formats["shape"] == "square"
    )
    _save(square, folder / "q.png", folder)
    _save(several[0], folder / "a.png", folder)
    _write_videos(folder)


def _write_videos(folder: Path) -> None:
    first, second = (pictures.video(SEED + seed, split="test", num_frames=8) for seed in range(2))
    frames = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in first.frames]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=250, loop=0, disposal=2)
    clip = folder / "clip_frames"
    clip.mkdir(exist_ok=True)
    for number, frame in enumerate(second.frames, start=1):
        Image.fromarray(frame).save(clip / f"frame_{number}.png", optimize=True)
    lines = [{"video": "clip.gif", "caption": first.caption}, {"video": "clip_frames", "caption": second.caption}]
    _write_lines(folder / "truth_videos.jsonl", lines)


def _scene(split: pictures.Split, seed: int, *, objects: int | None = None) -> Item:
    """The first scene from 10,000 * seed on with that many objects."""
    for candidate in range(10_000 * seed, 10_000 * (seed + 1)):
        item = pictures.scene(candidate, split=split)
        if objects is None or item.num_objects == objects:
            return item
    raise AssertionError("no such scene")


def _digit(split: pictures.Split, value: int) -> Item:
    """The first digit of that value from SEED + 100 * value on."""
    for seed in range(SEED + 100 * value, SEED + 100 * value + 1000):
        item = pictures.digit(seed, split=split)
        if item.formats["numeral"] == str(value):
            return item
    raise AssertionError("no such digit")


def _save(item: Item, path: Path, folder: Path) -> str:
    """Writes an item's image; its path relative to the folder."""
    Image.fromarray(item.frames[0]).save(path, optimize=True)
    return path.relative_to(folder).as_posix()


def _write_lines(path: Path, lines: Sequence[Line]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_examples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
