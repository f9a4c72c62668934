"""Which media a token sees where images in a group are seen together: against the sentence of the rule, for every layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flamingo_reference.phi import media_ranges, phi_from_tokens

IMAGE = 9


def seen_by_the_rule(tokens: tuple[int, ...], tiles: list[int], position: int) -> list[int]:
    """Media, counted from 1: walk back from the position to the last image, then over images that nothing parts from it."""
    owned, count = {}, 0
    images = [place for place, token in enumerate(tokens) if token == IMAGE]
    for place, number in zip(images, tiles, strict=False):
        owned[place] = range(count + 1, count + number + 1)
        count += number
    place = position
    while place >= 0 and tokens[place] != IMAGE:
        place -= 1
    media: list[int] = []
    while place >= 0 and tokens[place] == IMAGE:
        media = [*owned[place], *media]
        place -= 1
    return media


@pytest.mark.parametrize("length", range(1, 11))
def test_every_layout(length: int) -> None:
    layouts = list(itertools.product((5, IMAGE), repeat=length))
    tiles = np.array([[(7 * row + 3 * image) % 4 + 1 for image in range(length)] for row in range(len(layouts))])
    first, phi = media_ranges(np.array(layouts), IMAGE, tiles)
    for row, layout in enumerate(layouts):
        for place in range(length):
            wanted = seen_by_the_rule(layout, tiles[row].tolist(), place)
            found = list(range(first[row, place], phi[row, place] + 1)) if phi[row, place] else []
            assert found == wanted, (layout, place)
            assert (first[row, place] > 0) == (phi[row, place] > 0)


def test_ranges_are_causal() -> None:
    tokens, tiles = np.array([[IMAGE, IMAGE, 5, IMAGE, 5, 5, IMAGE, IMAGE, IMAGE]]), np.array([[2, 1, 4, 3, 1, 1]])
    first, phi = media_ranges(tokens, IMAGE, tiles)
    for length in range(1, tokens.shape[1] + 1):
        shorter = media_ranges(tokens[:, :length], IMAGE, tiles)
        np.testing.assert_array_equal(shorter[0], first[:, :length])
        np.testing.assert_array_equal(shorter[1], phi[:, :length])


def test_the_rule_of_transformers() -> None:
    """`get_cross_attention_token_mask` says for each image token from where to where it is seen; -1: to the end."""
    from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

    for layout in itertools.product((5, IMAGE), repeat=7):
        spans = get_cross_attention_token_mask(list(layout), IMAGE)
        ones = np.ones((1, 7), np.int64)
        first, phi = media_ranges(np.array([layout]), IMAGE, ones)
        for place in range(7):
            seen = [n + 1 for n, (start, stop) in enumerate(spans) if start <= place and (stop == -1 or place < stop)]
            assert seen == (list(range(first[0, place], phi[0, place] + 1)) if phi[0, place] else []), (layout, place)


def test_images_of_one_medium_that_stand_alone_are_phi() -> None:
    tokens = np.array([[5, IMAGE, 5, IMAGE, 5], [5, 5, 5, 5, IMAGE]])
    first, phi = media_ranges(tokens, IMAGE, np.ones((2, 2), np.int64))
    np.testing.assert_array_equal(phi, phi_from_tokens(tokens, IMAGE))
    np.testing.assert_array_equal(first, phi)


@pytest.mark.parametrize("tiles", [[[1]], [[1, 0]], [[1, 1], [1, 1]], [1, 1]])
def test_tiles_that_do_not_fit(tiles: list[object]) -> None:
    with pytest.raises(ValueError, match="media_of_image"):
        media_ranges(np.array([[IMAGE, 5, IMAGE]]), IMAGE, np.array(tiles))
