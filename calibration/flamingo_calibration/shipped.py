"""Samples that need no data of the user's: a small set for self-calibration, and pages like those the nano model was trained on.

All are made at run time, the same at every call: pictures are drawn, texts are our own. Random numbers are numpy's PCG64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flamingo_calibration.samples import Sample
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.runtime.videos import Video
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import PAPER, InputFormat
from flamingo_reference.nano import pictures

Pixels = npt.NDArray[np.uint8]

SHIPPED_TOKENS = 512
"""Positions that the shipped set has at least."""
NANO_PAGES = 64
_SIDE = 96
_CAPTIONS = (
    "evening light over a quiet bay",
    "stripes of a striped shirt hung out to dry",
    "a close view of rough grey stone",
    "tiles on a kitchen floor",
    "fog above the hills at dawn",
    "an old map pinned to a wall",
)
_PASSAGES = (
    "The ferry left at seven, and by noon the coast was only a thin line behind us. Nobody on board seemed to be in a hurry.",
    "To plant a pear tree, dig a hole twice as wide as the roots, loosen the soil, and water it well for the first two summers.",
    "In 1987 the library moved 41,500 books across the street by hand: volunteers formed a chain and passed them one by one.",
    "She asked whether the bridge would hold. 'It held yesterday,' he said, 'and yesterday it was raining.'",
)


def shipped_samples(config: ModelConfig, tokenizer: Tokenizer | None, inputs: InputFormat = PAPER) -> list[Sample]:
    """About 512 tokens with images and a video, in the forms of the model's prompts; for a model without tokenizer the ids are drawn.

    One sample of every kind at least, and as many more as SHIPPED_TOKENS take.
    """
    limit = config.language_model.position_limit or 1 << 30
    made = _drawn_ids(config) if tokenizer is None else _documents(inputs, videos=config.tiled is None)
    samples: list[Sample] = []
    tokens = 0
    for index, sample in enumerate(made):
        length = len(tokenizer.encode(sample.prompt)) if tokenizer and isinstance(sample.prompt, str) else len(sample.prompt)
        if length <= limit:
            samples.append(sample)
            tokens += length
        if tokens >= SHIPPED_TOKENS and index >= 5:
            break
    return [Sample(prompt=one.prompt, media=one.media, name=f"shipped sample {n}") for n, one in enumerate(samples, start=1)]


def nano_samples(inputs: InputFormat = PAPER) -> list[Sample]:
    """64 pages of the nano model's scenes and videos (training split): captions and questions with 0 to 3 examples before them."""
    samples = []
    for page in range(NANO_PAGES):
        seeds = range(4 * page, 4 * page + 1 + page % 4)
        items = [(pictures.video if page % 8 == 7 else pictures.scene)(seed, split="train") for seed in seeds]
        made = _page(items, inputs, ask=page % 3 == 1, videos=inputs.fit != "tiles")
        samples.append(Sample(prompt=made.prompt, media=made.media, name=f"nano page {page + 1}"))
    return samples


def _documents(inputs: InputFormat, *, videos: bool) -> Iterator[Sample]:
    for turn in itertools.count():
        first, second, third = (pictures.scene(3 * turn + n, split="train") for n in range(3))
        yield _page([first, second], inputs, ask=False, videos=videos)
        yield _page([third], inputs, ask=True, videos=videos)
        caption = _CAPTIONS[turn % len(_CAPTIONS)]
        before = caption_prompt([], picture(turn), inputs)
        yield Sample(prompt=_answered(before, caption), media=before.media)
        yield Sample(prompt=_PASSAGES[turn % len(_PASSAGES)])
        yield _page([pictures.video(turn, split="train", num_frames=4)], inputs, ask=False, videos=videos)
        passage = _PASSAGES[(turn + 1) % len(_PASSAGES)]
        yield Sample(prompt=f"{passage} {inputs.tags.image} {caption}", media=[picture(turn + 100)])


def _page(items: Sequence[pictures.Item], inputs: InputFormat, *, ask: bool, videos: bool) -> Sample:
    """Examples, then a query with its answer. videos: whether the model takes them; of one the first frame is shown otherwise."""
    shots = []
    for item in items:
        question, answer = item.questions[0] if ask else (None, item.caption)
        shots.append(Shot(question=question, answer=answer, medium=_medium(item, videos)))
    *before, last = shots
    request = (
        caption_prompt(before, last.medium, inputs)
        if last.question is None
        else qa_prompt(before, last.question, last.medium, inputs)
    )
    return Sample(prompt=_answered(request, f"{last.answer}{inputs.tags.eoc}"), media=request.media)


def _answered(request: Request, answer: str) -> str:
    """The prompt with its answer, behind a blank unless the prompt ends a line."""
    prompt = str(request.prompt)
    return f"{prompt}{answer}" if prompt.endswith("\n") else f"{prompt} {answer}"


def _medium(item: pictures.Item, videos: bool) -> Any:
    return Video(source=item.frames) if videos and len(item.frames) > 1 else item.frames[0]


def picture(seed: int) -> Pixels:
    """A drawn picture, uint8 RGB [96, 128, 3]: a ramp, stripes, tiles or grain in two colours, by turns."""
    random = np.random.default_rng([4, seed])
    colours = random.integers(0, 256, (2, 3)).astype(np.float64)
    y, x = np.mgrid[:_SIDE, : _SIDE * 4 // 3] / _SIDE
    turned = np.cos(0.7 * seed) * x + np.sin(0.7 * seed) * y
    kinds = (
        (turned - turned.min()) / np.ptp(turned),
        np.floor(turned * (4 + seed % 9)) % 2,
        (np.floor(x * 6) + np.floor(y * 6)) % 2,
        random.random(x.shape),
    )
    blend = kinds[seed % len(kinds)][:, :, None]
    drawn: Pixels = np.rint(colours[0] * (1 - blend) + colours[1] * blend).astype(np.uint8)
    return drawn


def _drawn_ids(config: ModelConfig) -> Iterator[Sample]:
    """Token ids in place of text, with pictures at several places."""
    ids = config.tokens
    special = {ids.pad, ids.bos, ids.eoc, ids.image, ids.reset}
    text = [token for token in range(config.language_model.vocab_size) if token not in special] or [ids.eoc]
    length = min(48, config.language_model.position_limit or 48)
    for turn in itertools.count():
        random = np.random.default_rng([5, turn])
        tokens = [ids.bos, *(text[index] for index in random.integers(0, len(text), length - 1))]
        media: list[Any] = []
        for place in ((1, length // 2), (length // 3,), (), (2, 3))[turn % 4]:
            tokens[place] = ids.image
            moving = turn % 4 == 1 and config.tiled is None
            frames = [picture(8 * turn + n) for n in range(4)]
            media.append(Video(source=frames) if moving else picture(turn + place))
        yield Sample(prompt=tokens, media=media)
