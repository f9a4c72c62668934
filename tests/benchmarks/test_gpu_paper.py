"""Bytes of a step on paper, by hand for one case."""

from __future__ import annotations

import gpu_paper
import pytest

from flamingo_export.precision import Precision
from flamingo_reference.config import SIZES


def test_a_row_of_9b_reads_what_it_holds():
    """40 layers of 32 heads of 128, keys and values, 2 bytes: 655,360 a slot; 10 gated layers of 32 heads, 64 latents, 128."""
    config, precision = SIZES["9b"], Precision(storage="bf16")
    lm, block = config.language_model, config.cross_attention
    slot = 2 * lm.num_layers * lm.kv_heads * lm.head_size * 2
    assert slot == 655_360
    found = gpu_paper.step(config, precision, rows=8, length=1000, beams=3, capacity=4096)
    assert found.caches == 8 * (900 + 3 * 100) * slot
    assert found.caches_without_lengths == 8 * 4096 * slot
    assert found.media == 8 * 2 * len(config.gated_layers) * block.num_heads * 64 * block.head_size * 2
    # The embedding is the output's matrix too where the head is tied, and is then read whole.
    assert found.weights > 2 * 9e9
    assert found.milliseconds(1e12, lengths=True) == pytest.approx((found.weights + found.caches + found.media) / 1e9)
    assert not gpu_paper.step(config, precision, rows=64, length=1000, beams=1, capacity=4096).fits(141e9)
    assert found.fits(141e9)


def test_a_row_of_llama_reads_the_tiles_of_an_image():
    """8 gated layers of 8 heads of 128, 4 tiles of 1601 keys: 210 MB in 16 bits; copied first, where there is no plugin, three times that."""
    config = SIZES["llama-3.2-11b-vision"]
    found = gpu_paper.step(config, Precision(storage="bf16"), rows=2, length=1000, beams=1, capacity=4096)
    assert found.media == 2 * 209_846_272
    assert found.media_without_plugin == 3 * found.media


def test_what_a_step_sends():
    """Six small feeds in places of 256 bytes; a greedy row changes eight bytes of its mask, and one token passes on the device. Whole: the mask,
    a byte a slot, and key positions, eight."""
    found = gpu_paper.step(SIZES["9b"], Precision(storage="bf16"), rows=1, length=1000, beams=1, capacity=4096)
    assert found.sent == 6 * 256 + 2 * 16
    assert found.sent_whole == 6 * 8 + 4096 + 8 * 4096
