"""What a text tower is shown: the texts of the samples' prompts, one at each image's place, as its own tokenizer spells them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flamingo_export.bundle.bundled_tokenizer import checked_text_tokenizer
from flamingo_export.errors import CheckpointError
from flamingo_export.sources import WeightSource
from flamingo_reference.arrays import Ints
from flamingo_reference.contrastive_config import TextConfig
from flamingo_reference.input_format import InputFormat

DRAWN_TEXTS = 32
"""Texts of random tokens where there are no others."""


def tower_texts(source: WeightSource, prompts: Sequence[str]) -> tuple[tuple[Ints, ...], str]:
    """Token ids of what a model's text tower is calibrated on, int64 [S] each, and a note where they are not texts (empty otherwise).

    prompts: of the samples, with their tags, which are cut there. A text that is too long for the tower is halved until its parts are not.
    Nothing where the model has no text tower; random tokens where it has no tokenizer, or there is no text.
    """
    contrastive = source.config.contrastive
    if contrastive is None or contrastive.text is None:
        return (), ""
    text, why = contrastive.text, "there is no tokenizer for it"
    if source.text_tokenizer is not None:
        try:
            encode = _Encoder(checked_text_tokenizer(source.text_tokenizer, text), text)
        except CheckpointError as error:
            why = str(error).removesuffix(".")
        else:
            found = tuple(ids for prompt in prompts for piece in _pieces(prompt, source.inputs) for ids in encode(piece))
            if found:
                return found, ""
            why = "the samples have no text"
    return tuple(_drawn(text)), f"the text tower is calibrated on random tokens: {why}"


class _Encoder:
    def __init__(self, tokenizer: str, text: TextConfig) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._most = text.max_positions

    def __call__(self, text: str) -> Iterator[Ints]:
        ids = self._tokenizer.encode(text).ids
        words = text.split()
        if len(ids) > self._most and len(words) > 1:
            yield from self(" ".join(words[: len(words) // 2]))
            yield from self(" ".join(words[len(words) // 2 :]))
        elif ids:
            yield np.asarray(ids[: self._most], np.int64)


def _pieces(prompt: str, inputs: InputFormat) -> Iterator[str]:
    """What stands between a prompt's tags."""
    for piece in re.split("|".join(re.escape(tag) for tag in inputs.tags.all), prompt):
        if piece.strip():
            yield piece.strip()


def _drawn(text: TextConfig) -> Iterator[Ints]:
    random = np.random.default_rng(6)
    for turn in range(DRAWN_TEXTS):
        length = 1 + turn * (text.max_positions - 1) // (DRAWN_TEXTS - 1)
        yield random.integers(0, text.vocab_size, length, np.int64)
