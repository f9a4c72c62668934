"""What nano's contrastive encoder tells apart, measured on held-out items: `python -m flamingo_reference.nano.zero_shot [--card]`.

Classification: labels are captions, the likeliest wins. Retrieval: images and texts of all held-out scenes and digits together; a text is right
for every image that it describes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from flamingo_reference.arrays import Floats32
from flamingo_reference.model import Flamingo
from flamingo_reference.model.contrastive import features_and_pooled
from flamingo_reference.nano import pictures
from flamingo_reference.nano.batches import to_pixels
from flamingo_reference.nano.heldout import COUNTS, heldout
from flamingo_reference.nano.pictures import Item
from flamingo_reference.nano.towers import encoded
from flamingo_reference.nano.train_tokenizer import load_tokenizer

RANKS = (1, 5, 10)
BEGIN, END = "<!-- zero-shot -->", "<!-- /zero-shot -->"
DIGIT_LABELS = tuple(f"the digit {name}" for name in pictures.NUMBERS)
SCENE_LABELS = tuple(f"a {colour} {shape}" for colour in pictures.COLOURS for shape in pictures.SHAPES)


class Encoder:
    """The towers of a checkpoint in fp32."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises ValueError if the checkpoint has no contrastive encoder with a text tower."""
        self.model = Flamingo.from_checkpoint(checkpoint).requires_grad_(False).eval()
        self.tokenizer = load_tokenizer(checkpoint / "tokenizer" / "tokenizer.json")
        if self.model.contrastive is None or self.model.contrastive.text is None:
            raise ValueError(f"{checkpoint} has no text tower; python -m flamingo_reference.nano.towers trains one")

    @torch.no_grad()
    def images(self, items: Sequence[Item]) -> Floats32:
        """Embeddings [N, J] of items of one frame."""
        towers = self.model.contrastive
        assert towers is not None
        found = []
        for start in range(0, len(items), 100):
            pixels = to_pixels([item.frames[0] for item in items[start : start + 100]], self.model.config)
            _, pooled = features_and_pooled(self.model.vision_encoder, pixels, towers.config, towers.readout)
            found.append(towers.image(pooled))
        return torch.cat(found).numpy()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Floats32:
        """Embeddings [N, J]."""
        towers = self.model.contrastive
        assert towers is not None
        assert towers.text is not None
        found: Floats32 = towers.text(*encoded(self.tokenizer, list(texts))).numpy()
        return found


def accuracy(images: Floats32, labels: Floats32, right: Sequence[int]) -> float:
    """Percent of images whose likeliest label is the right one."""
    return 100 * float(np.mean(np.argmax(images @ labels.T, axis=1) == np.asarray(right)))


def recall(cosines: Floats32, true: npt.NDArray[np.bool_], rank: int) -> float:
    """Percent of rows that have one of their true columns among the `rank` largest."""
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :rank]
    return 100 * float(np.mean(np.take_along_axis(true, best, axis=1).any(axis=1)))


class Embeds(Protocol):
    """What embeds images and texts: the reference's towers, or a bundle's."""

    def images(self, items: Sequence[Item]) -> Floats32: ...

    def texts(self, texts: Sequence[str]) -> Floats32: ...


def measured(encoder: Embeds) -> str:
    """The tables, as the model card has them."""
    scenes, digits = heldout("scene", COUNTS["scene"]), heldout("digit", COUNTS["digit"])
    of_scenes, of_digits = encoder.images(scenes), encoder.images(digits)
    single = [place for place, item in enumerate(scenes) if item.num_objects == 1]
    alone = accuracy(of_scenes[single], encoder.texts(SCENE_LABELS), [SCENE_LABELS.index(scenes[p].caption) for p in single])
    written = accuracy(of_digits, encoder.texts(DIGIT_LABELS), [DIGIT_LABELS.index(item.caption) for item in digits])
    lines = [
        "| zero-shot classification, held-out | right | labels | of |",
        "|---|---|---|---|",
        f"| scenes of one object, by colour and shape | {alone:.1f} % | {len(SCENE_LABELS)} | {len(single)} |",
        f"| digits | {written:.1f} % | {len(DIGIT_LABELS)} | {len(digits)} |",
        "",
        "| retrieval, held-out | R@1 | R@5 | R@10 | of |",
        "|---|---|---|---|---|",
    ]
    items = [*scenes, *digits]
    images = np.concatenate([of_scenes, of_digits])
    texts = list(dict.fromkeys(item.description for item in items))
    cosines = images @ encoder.texts(texts).T
    true = np.asarray([[item.description == text for text in texts] for item in items])
    spoken = np.asarray([not text.startswith("the digit ") for text in texts])
    for name, rows, columns in (("scene", slice(0, len(scenes)), spoken), ("digit", slice(len(scenes), None), ~spoken)):
        for way, found, answers in (
            (f"{name}: its text among {len(texts)}", cosines[rows], true[rows]),
            (f"text of a {name}: an image of {len(items)}", cosines.T[columns], true.T[columns]),
        ):
            shares = " | ".join(f"{recall(found, answers, rank):.1f} %" for rank in RANKS)
            lines.append(f"| {way} | {shares} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=folder / "checkpoint")
    parser.add_argument("--card", action="store_true", help="write the tables into MODEL_CARD.md")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables = measured(Encoder(arguments.checkpoint))
    print(tables)
    if arguments.card:
        path = folder / "MODEL_CARD.md"
        text = path.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        path.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
