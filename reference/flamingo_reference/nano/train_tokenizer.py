"""The nano model's tokenizer: byte-level BPE, so that any text can be encoded, trained on the generated text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flamingo_reference.nano import pictures

SPECIAL = ("<PAD>", "<BOS>", "<EOC>", "<image>")
"""In the order of `config.PAPER_TOKENS`."""


def texts(count: int) -> Iterator[str]:
    """What the tokenizer is trained on: all that is written of so many drawn items, prompts included. The same each time."""
    rng = np.random.default_rng(0)
    for seed in range(count):
        draw = rng.random()
        if draw < 0.7:
            item = pictures.scene(seed, split="train")
        elif draw < 0.85:
            item = pictures.digit(seed, split="train")
        else:
            item = pictures.video(seed, split="train", num_frames=1)
        for text in item.formats.values():
            yield f"Output: {text}"
        yield item.caption
        for question, answer in item.questions:
            yield f"Question: {question} Answer: {answer}"
        yield item.description


def train_tokenizer(vocab_size: int, *, num_items: int = 3000) -> Tokenizer:
    """A tokenizer of exactly vocab_size tokens, unused ones filled in where the text has no more pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(num_items), trainer)
    if missing := vocab_size - tokenizer.get_vocab_size():
        tokenizer.add_special_tokens([f"<unused_{index}>" for index in range(missing)])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`."""
    return Tokenizer.from_file(str(path))
