"""Tokenizer and documents: any text goes through and comes back, and documents have the paper's form."""

from __future__ import annotations

import numpy as np
import pytest

from flamingo_reference.config import NANO, PAPER_TOKENS
from flamingo_reference.nano import pages, pictures
from flamingo_reference.nano.train_tokenizer import SPECIAL, texts, train_tokenizer
from flamingo_reference.phi import phi_from_tokens

VOCABULARY = NANO.language_model.vocab_size


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(VOCABULARY, num_items=400)


@pytest.fixture(scope="module")
def items():
    return [pictures.scene(seed, split="train") for seed in range(6)]


def test_special_tokens_have_the_ids_of_the_config(tokenizer):
    wanted = (PAPER_TOKENS.pad, PAPER_TOKENS.bos, PAPER_TOKENS.eoc, PAPER_TOKENS.image)
    assert tuple(tokenizer.token_to_id(token) for token in SPECIAL) == wanted
    assert tokenizer.get_vocab_size() == VOCABULARY


@pytest.mark.parametrize(
    "text", [" two red circles and a blue square", "Größe: 日本語 🦩", "\n\ttabs  and   spaces ", "", "ÿ\x00\x7f"]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_again_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer(VOCABULARY, num_items=400).to_str() == tokenizer.to_str()


def test_it_is_trained_on_every_word_of_items_that_are_held_out():
    """Scenes, digits and videos: captions, questions and answers."""
    known = {word for text in texts(400) for word in text.split()}
    for seed in range(40):
        for item in (pictures.scene(seed, split="test"), pictures.digit(seed, split="test"),
                     pictures.video(seed, split="test", num_frames=1)):  # fmt: skip
            written = " ".join(
                [item.caption, item.description, *(f"{question} {answer}" for question, answer in item.questions)]
            )
            assert set(written.split()) <= known


def test_few_shot_prompt_is_the_papers(tokenizer, items):
    pieces = [pages.Piece(0, "Question: What shape is red? Answer:", " circle"), pages.Piece(1, "Output:", " a red circle")]
    encoded = pages.encode(pieces, tokenizer, PAPER_TOKENS)
    text = tokenizer.decode(encoded.token_ids.tolist(), skip_special_tokens=False)
    assert text == ("<BOS><image>Question: What shape is red? Answer: circle<EOC><image>Output: a red circle<EOC>")
    assert np.array_equal(encoded.phi, phi_from_tokens(encoded.token_ids[None], PAPER_TOKENS.image)[0])
    assert encoded.media == (0, 1)
    said = tokenizer.decode(encoded.token_ids[encoded.loss].tolist(), skip_special_tokens=False)
    assert said == " circle<EOC> a red circle<EOC>"


def test_text_only_examples_see_no_image(tokenizer, items):
    rng = np.random.default_rng(0)
    pieces = pages.prompt_page(items, rng, lambda rng, style: 1, style="caption", shots=3, text_only=2)
    encoded = pages.encode(pieces, tokenizer, PAPER_TOKENS)
    first_image = int(np.flatnonzero(encoded.token_ids == PAPER_TOKENS.image)[0])
    assert (encoded.token_ids == PAPER_TOKENS.image).sum() == 1
    assert not encoded.phi[:first_image].any()
    assert (encoded.phi[first_image:] == 1).all()


def test_text_before_its_image_sees_the_next_one(tokenizer):
    pieces = [pages.Piece(4, "", "red", text_first=True), pages.Piece(2, "", "blue", text_first=True)]
    encoded = pages.encode(pieces, tokenizer, PAPER_TOKENS)
    assert tokenizer.decode(encoded.token_ids.tolist(), skip_special_tokens=False) == "<BOS>red<EOC><image>blue<EOC><image>"
    images = np.flatnonzero(encoded.token_ids == PAPER_TOKENS.image)
    assert encoded.phi[0] == 0
    assert (encoded.phi[1 : images[0] + 1] == 1).all()
    assert (encoded.phi[images[0] + 1 :] == 2).all()


def test_interleaved_pages_keep_to_five_images_and_use_both_orders(items):
    rng = np.random.default_rng(3)
    found = [pages.interleaved_page(items, rng, lambda rng, style: int(rng.integers(len(items)))) for _ in range(60)]
    assert all(2 <= len(page) <= 5 for page in found)
    assert {page[0].text_first for page in found} == {True, False}
    assert {page[0].said.startswith(" ") for page in found} == {True, False}
