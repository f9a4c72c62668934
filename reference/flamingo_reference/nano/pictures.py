"""Data of the nano model: rendered scenes and videos of shapes, and scikit-learn's scans of handwritten digits.

Everything is drawn from a seed. Training and test never share a scene's structure (shapes, colours, sizes and cells; the split is by
its digest) nor a scan. Images are uint8 RGB [64, 64, 3].
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Split = Literal["train", "test"]
Pixels = npt.NDArray[np.uint8]

SIDE = 64
CELL = 20.5  # pixels between the centres of neighbouring cells
SHAPES = ("circle", "cross", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 230),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 190),
    "white": (240, 240, 240),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


class Thing(msgspec.Struct, frozen=True):
    """One shape in one of the nine cells of a scene."""

    shape: str
    colour: str
    large: bool
    cell: int

    def describe(self) -> str:
        """Everything there is to say: `large red circle top left`."""
        return f"{'large' if self.large else 'small'} {self.colour} {self.shape} {PLACES[self.cell]}"


class Item(msgspec.Struct, frozen=True):
    """A medium with all that is asked of it.

    frames: one image, or a video's; `formats` are the ways a few-shot task may want it put, `caption` among them.
    """

    frames: tuple[Any, ...]
    caption: str
    description: str
    questions: tuple[tuple[str, str], ...]
    formats: dict[str, str]
    kind: str
    num_objects: int


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _group_phrase(things: Sequence[Thing]) -> str:
    colour, shape = things[0].colour, things[0].shape
    return f"a {colour} {shape}" if len(things) == 1 else f"{NUMBERS[len(things)]} {colour} {_plural(shape)}"


def _groups(things: Sequence[Thing]) -> list[list[Thing]]:
    """Things of one shape and colour together, in alphabetical order of shape."""
    keys = sorted({(thing.shape, thing.colour) for thing in things})
    return [[thing for thing in things if (thing.shape, thing.colour) == key] for key in keys]


def is_test(key: object) -> bool:
    """Whether what has this key is held out: one in eight, by digest."""
    return hashlib.sha256(repr(key).encode()).digest()[0] % 8 == 0


def draw_things(rng: np.random.Generator, *, num_groups: int, split: Split) -> list[Thing]:
    """Random things in distinct cells, of the asked split."""
    while True:
        shapes = rng.choice(SHAPES, num_groups, replace=False)
        colours = rng.choice(list(COLOURS), num_groups, replace=False)
        counts = rng.integers(1, 4, num_groups) if num_groups > 1 else rng.choice([1, 2, 3], 1, p=[0.55, 0.25, 0.2])
        cells = iter(rng.permutation(9).tolist())
        things = [
            Thing(str(shape), str(colour), bool(rng.random() < 0.5), next(cells))
            for shape, colour, count in zip(shapes, colours, counts, strict=True)
            for _ in range(count)
        ]
        key = sorted(thing.describe() for thing in things)
        if is_test(key) == (split == "test"):
            return things


def vary(rng: np.random.Generator, things: Sequence[Thing]) -> list[Thing]:
    """The same things but for one attribute of one of them: a hard negative for contrastive training."""
    things = list(things)
    index = int(rng.integers(len(things)))
    thing = things[index]
    free = [cell for cell in range(9) if all(cell != other.cell for other in things)]
    match int(rng.integers(4)):
        case 0:
            thing = msgspec.structs.replace(thing, shape=str(rng.choice([shape for shape in SHAPES if shape != thing.shape])))
        case 1:
            thing = msgspec.structs.replace(thing, colour=str(rng.choice([name for name in COLOURS if name != thing.colour])))
        case 2:
            thing = msgspec.structs.replace(thing, large=not thing.large)
        case _:
            thing = msgspec.structs.replace(thing, cell=int(rng.choice(free)))
    things[index] = thing
    return things


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    match thing.shape:
        case "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        case "square":
            side = radius * 0.88
            draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
        case "triangle":
            draw.polygon(
                [(x, y - radius * 1.1), (x - radius * 1.05, y + radius * 0.8), (x + radius * 1.05, y + radius * 0.8)],
                fill=colour,
            )
        case _:
            arm = radius * 0.36
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def render(rng: np.random.Generator, things: Sequence[Thing], offsets: Sequence[tuple[float, float]] | None = None) -> Pixels:
    """Draws the things on a dark ground, with jitter of place, size and colour.

    offsets: pixels to move each thing by (videos).
    """
    scale = 2
    ground = tuple(int(value) for value in np.clip(rng.integers(5, 80) + rng.integers(-8, 9, 3), 0, 255))
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), ground)
    draw = ImageDraw.Draw(canvas)
    for index, thing in enumerate(things):
        row, column = divmod(thing.cell, 3)
        moved = offsets[index] if offsets is not None else (0.0, 0.0)
        x, y = (
            (SIDE / 2 + (place - 1) * CELL + rng.uniform(-1.8, 1.8) + shift) * scale
            for place, shift in zip((column, row), moved, strict=True)
        )
        radius = (rng.uniform(8.4, 9.5) if thing.large else rng.uniform(5.0, 6.0)) * scale
        colour = tuple(int(value) for value in np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3), 0, 255))
        _draw(draw, thing, x, y, radius, colour)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def _questions(things: Sequence[Thing]) -> list[tuple[str, str]]:
    groups = _groups(things)
    questions = [("How many shapes are there?", NUMBERS[len(things)])]
    for group in groups:
        shape, several = group[0].shape, len(group) > 1
        questions.append(
            (f"What colour {'are' if several else 'is'} the {_plural(shape) if several else shape}?", group[0].colour)
        )
        questions.append((f"How many {_plural(shape)} are there?", NUMBERS[len(group)]))
        questions.append((f"What shape is {group[0].colour}?", shape))
        if not several:
            questions.append((f"Where is the {shape}?", PLACES[group[0].cell]))
            questions.append((f"Is the {shape} small or large?", "large" if group[0].large else "small"))
    return questions


def scene(seed: int, *, split: Split, num_groups: int | None = None) -> Item:
    """A rendered scene of one or two groups of shapes; about half of them hold two or more objects."""
    rng = np.random.default_rng([1, seed])
    things = draw_things(rng, num_groups=num_groups or (1 if rng.random() < 0.72 else 2), split=split)
    return scene_of(rng, things)


def scene_of(rng: np.random.Generator, things: Sequence[Thing]) -> Item:
    """The item that shows these things."""
    groups = _groups(things)
    caption = " and ".join(_group_phrase(group) for group in groups)
    formats = {"caption": caption, "number": str(len(things))}
    if len(groups) == 1:
        formats |= {"colour": groups[0][0].colour, "shape": groups[0][0].shape}
        formats["reversed"] = " ".join(reversed(caption.split()))
        if len(things) == 1:
            formats |= {"place": PLACES[things[0].cell], "size": "large" if things[0].large else "small"}
    return Item(
        frames=(render(rng, things),),
        caption=caption,
        description=", ".join(thing.describe() for thing in sorted(things, key=lambda thing: thing.cell)),
        questions=tuple(_questions(things)),
        formats=formats,
        kind="scene",
        num_objects=len(things),
    )


@functools.cache
def _scans() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def scan_indices(split: Split) -> list[int]:
    """Which of the 1,797 scans belong to a split: every fourth is held out."""
    return [index for index in range(len(_scans()[1])) if (index % 4 == 0) == (split == "test")]


def digit(seed: int, *, split: Split) -> Item:
    """A scan of a handwritten digit, enlarged, somewhere on a dark ground. The scans are 8x8 with 17 shades."""
    rng = np.random.default_rng([2, seed])
    indices = scan_indices(split)
    images, labels = _scans()
    index = indices[seed % len(indices)]
    return digit_of(images[index], int(labels[index]), rng)


def digit_of(scan: npt.NDArray[np.float64], label: int, rng: np.random.Generator) -> Item:
    """The item that shows a scan [8, 8] in 0..16."""
    side = int(rng.integers(46, 61))
    enlarged = Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIDE, SIDE), 0)
    x, y = (int(value) for value in rng.integers(0, SIDE - side + 1, 2))
    canvas.paste(enlarged, (x, y))
    grey = np.asarray(canvas, dtype=np.float32) * rng.uniform(0.75, 1.0) + rng.uniform(0, 20)
    pixels = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    name, parity = NUMBERS[label], "odd" if label % 2 else "even"
    return Item(
        frames=(pixels,),
        caption=f"the digit {name}",
        description=f"the digit {name}",
        questions=(("What digit is this?", name), ("Is the digit odd or even?", parity)),
        formats={"caption": f"the digit {name}", "numeral": str(label), "parity": parity, "word": name},
        kind="digit",
        num_objects=1,
    )


def roaming(rng: np.random.Generator) -> Item:
    """A training scene of one shape anywhere in the image, its place named after the nearest cell: what a video's frames look like."""
    while True:
        thing, dx, dy = lone_thing(rng), float(rng.uniform(-22, 22)), float(rng.uniform(-22, 22))
        nearest = msgspec.structs.replace(thing, cell=3 * round(1 + dy / CELL) + round(1 + dx / CELL))
        if not is_test([nearest.describe()]):
            break
    return msgspec.structs.replace(scene_of(rng, [nearest]), frames=(render(rng, [thing], [(dx, dy)]),))


def video(seed: int, *, split: Split, num_frames: int | None = None) -> Item:
    """A shape that moves across the image in 4 to 8 frames."""
    rng = np.random.default_rng([3, seed])
    while True:
        thing, direction = lone_thing(rng), str(rng.choice(list(DIRECTIONS)))
        if is_test_motion(thing, direction) == (split == "test"):
            break
    return video_of(rng, thing, direction, num_frames or int(rng.integers(4, 9)))


def is_test_motion(thing: Thing, direction: str) -> bool:
    """Whether videos of this thing moving this way are held out."""
    return is_test(("video", thing.describe(), direction))


def lone_thing(rng: np.random.Generator) -> Thing:
    """A random thing in the center cell."""
    return Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), bool(rng.random() < 0.5), 4)


def video_of(rng: np.random.Generator, thing: Thing, direction: str, num_frames: int) -> Item:
    """The item that shows a thing of the center cell moving."""
    dx, dy = DIRECTIONS[direction]
    length, across = rng.uniform(24, 38), rng.uniform(-14, 14)
    state = rng.bit_generator.state
    frames = []
    for step in np.linspace(-0.5, 0.5, num_frames):
        rng.bit_generator.state = state  # the same jitter in every frame: only the place changes
        along = step * length
        frames.append(render(rng, [thing], [(dx * along + abs(dy) * across, dy * along + abs(dx) * across)]))
    phrase = f"a {thing.colour} {thing.shape}"
    return Item(
        frames=tuple(frames),
        caption=f"{phrase} moving {direction}",
        description=f"{phrase} moving {direction}",
        questions=(
            (f"Which way does the {thing.shape} move?", direction),
            (f"What colour is the {thing.shape}?", thing.colour),
        ),
        formats={"caption": f"{phrase} moving {direction}", "direction": direction},
        kind="video",
        num_objects=1,
    )
