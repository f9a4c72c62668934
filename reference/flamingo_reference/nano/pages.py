"""Training documents in the paper's formats: prompts of shots, interleaved pages, pairs.

A document is a list of pieces; `encode` turns it into token ids, phi and the mask of tokens that carry loss.
Formats: Flamingo (arXiv 2204.14198), appendix A.2 (training) and C (evaluation prompts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from flamingo_reference.config import TokenIds
from flamingo_reference.nano.pictures import Item

MAX_IMAGES = 5  # a page of the paper's training data keeps its first five images

Draw = Callable[[np.random.Generator, str | None], int]
"""(generator, format or None) -> index of a random item that can be put that way."""


class Piece(msgspec.Struct, frozen=True):
    """Text about an item. medium: the item's index, None where the image is left out; text that is `given` carries no loss."""

    medium: int | None
    given: str
    said: str
    text_first: bool = False


class Encoded(msgspec.Struct, frozen=True):
    """token_ids and phi int64 [S], loss bool [S] (whether the token is to be predicted), media: item indices in order."""

    token_ids: npt.NDArray[np.int64]
    phi: npt.NDArray[np.int64]
    loss: npt.NDArray[np.bool_]
    media: tuple[int, ...]


def shot(item: Item, index: int | None, rng: np.random.Generator, *, style: str) -> Piece:
    """One example in a prompt: a question with its answer, or the item put as `style` asks."""
    if style == "question":
        question, answer = item.questions[int(rng.integers(len(item.questions)))]
        return Piece(index, f"Question: {question} Answer:", f" {answer}")
    return Piece(index, "Output:", f" {item.formats[style]}")


def prompt_page(
    items: Sequence[Item], rng: np.random.Generator, draw: Draw, *, style: str, shots: int, text_only: int = 0
) -> list[Piece]:
    """Examples of one style; the first `text_only` of them come without their images (the paper's zero-shot prompts)."""
    pieces = []
    for position in range(shots):
        index = draw(rng, None if style == "question" else style)
        pieces.append(shot(items[index], None if position < text_only else index, rng, style=style))
    return pieces


def interleaved_page(items: Sequence[Item], rng: np.random.Generator, draw: Draw) -> list[Piece]:
    """A web page in small: captions beside images, all before or all after their image (probability one half each)."""
    text_first = bool(rng.random() < 0.5)
    space = " " if rng.random() < 0.5 else ""
    indices = [draw(rng, None) for _ in range(int(rng.integers(2, MAX_IMAGES + 1)))]
    return [Piece(index, "", space + items[index].caption, text_first) for index in indices]


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer, tokens: TokenIds) -> Encoded:
    """Tokens of a document: `<BOS>`, then each piece with its `<image>` and an `<EOC>` after its text.

    A piece whose text comes first has its image behind the text, and the text's phi is that next image (the paper's p_next).
    """
    ids, phi, loss = [tokens.bos], [0], [False]
    media: list[int] = []

    def put(values: Sequence[int], medium: int, wanted: bool) -> None:
        ids.extend(values)
        phi.extend([medium] * len(values))
        loss.extend([wanted] * len(values))

    for piece in pieces:
        if piece.medium is not None:
            media.append(piece.medium)
        if piece.medium is not None and not piece.text_first:
            put([tokens.image], len(media), False)
        if piece.given:
            put(tokenizer.encode(piece.given).ids, len(media), False)
        put([*tokenizer.encode(piece.said).ids, tokens.eoc], len(media), True)
        if piece.medium is not None and piece.text_first:
            put([tokens.image], len(media), False)
    return Encoded(np.array(ids), np.array(phi), np.array(loss), tuple(media))
