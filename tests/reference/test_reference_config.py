"""Configuration, phi and time weights: the part of the reference that needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_models import TINY, smaller
from variations import VARIATIONS

import flamingo_reference
from flamingo_reference.config import (
    NANO,
    QUOTED_PARAMETERS,
    SIZES,
    AlibiPositions,
    ConfigError,
    ModelConfig,
    NFNetConfig,
    RotaryPositions,
)
from flamingo_reference.phi import phi_after, phi_from_tokens
from flamingo_reference.time_weights import time_weights


@pytest.mark.parametrize("config", [TINY, *SIZES.values()], ids=lambda config: config.name)
def test_presets_are_valid_and_survive_json(config: ModelConfig) -> None:
    config.validate()
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config


def test_sizes_of_the_paper() -> None:
    """Alayrac et al., table 5; the vision encoder's are F6's (Brock et al., table 6)."""
    for name, layers, width, every in (("3b", 24, 2048, 1), ("9b", 40, 4096, 4), ("80b", 80, 8192, 7)):
        lm, block = SIZES[name].language_model, SIZES[name].cross_attention
        assert (lm.num_layers, lm.width, lm.ffw_width, lm.num_heads * 128, lm.head_size) == (
            layers,
            width,
            4 * width,
            width,
            128,
        )
        assert (block.every, block.ffw_width, block.num_heads * 128, block.head_size) == (every, 4 * width, width, 128)
        resampler = SIZES[name].resampler
        assert (resampler.num_layers, resampler.width, resampler.num_heads, resampler.ffw_width) == (6, 1536, 16, 6144)
        assert (resampler.num_latents, resampler.num_time_embeddings) == (64, 8)
        vision = SIZES[name].vision
        assert isinstance(vision, NFNetConfig)
        assert (vision.num_patches, vision.stride) == (100, 32)
    assert set(QUOTED_PARAMETERS) == {"3b", "9b", "80b"}


def test_gated_layers() -> None:
    assert SIZES["3b"].gated_layers == tuple(range(24))
    assert SIZES["9b"].gated_layers == (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)
    assert SIZES["80b"].gated_layers == (0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77)
    assert NANO.gated_layers == (0, 2, 4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vision": {"widths": (32, 64)}}, r"vision.widths \(32, 64\) and vision.depths \(1, 2, 1\) differ in length"),
        ({"vision": {"widths": (32, 64, 104)}}, "vision.group_width 16 does not divide bottleneck width 52"),
        ({"vision": {"group_width": 0}}, "vision.group_width is 0, expected at least 1"),
        ({"vision": {"depths": (1, 0, 1)}}, r"vision.depths is \(1, 0, 1\), expected at least 1"),
        ({"vision": {"bottleneck_ratio": 0.001}}, "does not divide bottleneck width 0"),
        ({"vision": {"bottleneck_ratio": 1e308}}, "vision.bottleneck_ratio is 1e[+]308, expected one from 0 to 16"),
        ({"vision": {"squeeze_excite_ratio": -0.5}}, "vision.squeeze_excite_ratio is -0.5, expected one from 0 to 16"),
        ({"resampler": {"num_latents": 0}}, "resampler.num_latents is 0"),
        ({"cross_attention": {"every": 0}}, "cross_attention.every is 0"),
        ({"cross_attention": {"num_heads": -1}}, "cross_attention.num_heads is -1"),
        ({"language_model": {"max_positions": 0}}, "language_model.max_positions is 0"),
        ({"language_model": {"width": 127}}, "language_model.width 127 is odd"),
        ({"tokens": {"eoc": 512}}, "tokens.eoc 512 is outside the vocabulary of 512"),
        ({"tokens": {"image": 2}}, "tokens.image 2 is also another token"),
    ],
)
def test_impossible_models_are_refused(parts: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smaller(NANO, **parts).validate()


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("idefics-like", {"vision": {"num_heads": 3}}, "vision.num_heads 3 does not divide vision.width 40"),
        ("idefics-like", {"vision": {"patch_size": 31}}, "vision.patch_size 31 is larger than vision.image_size 30"),
        ("idefics-like", {"resampler": {"width": 44}}, "resampler.width 44 differs from the vision encoder's 40"),
        ("idefics-like", {"resampler": {"num_time_embeddings": -1}}, "num_time_embeddings is -1, expected at least 0"),
        ("idefics-like", {"language_model": {"num_kv_heads": 3}}, "num_kv_heads 3 does not divide num_heads 4"),
        ("idefics-like", {"language_model": {"norm_bias": True}}, "norm_bias is for LayerNorm"),
        ("idefics-like", {"language_model": {"positions": RotaryPositions(size=5)}}, "positions.size 5 is not an even number"),
        ("idefics-like", {"language_model": {"positions": RotaryPositions(size=14)}}, "from 2 to head_size 12"),
        ("idefics-like", {"language_model": {"positions": RotaryPositions(size=4, base=0.0)}}, "positions.base is 0.0"),
        ("idefics-like", {"tokens": {"reset": 61}}, "tokens.image 61 is also another token"),
        ("idefics-like", {"tokens": {"reset": 62}}, "tokens.reset 62 is outside the vocabulary of 62"),
        ("openflamingo-mpt-like", {"cross_attention": {"offset": 2}}, "cross_attention.offset 2 is outside 0 to 1"),
        *(
            ("idefics-like", {"language_model": {"positions": RotaryPositions(size=4, base=base)}}, f"positions.base is {base}")
            for base in (float("nan"), float("inf"), -1.0)
        ),
        *(
            ("openflamingo-mpt-like", {"language_model": {"positions": AlibiPositions(max_bias=bias)}}, f"max_bias is {bias}")
            for bias in (float("nan"), float("inf"), 0.0, -8.0)
        ),
        ("openflamingo-mpt-like", {"cross_attention": {"every": 9, "offset": 8}}, "no layer is gated"),
    ],
)
def test_impossible_variations_are_refused(name: str, parts: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smaller(VARIATIONS[name], **parts).validate()


def test_configs_of_earlier_versions_still_load() -> None:
    """nano's as it was written before there were variations and towers."""
    earlier = (Path(__file__).parent / "data" / "nano-0.1.0.json").read_bytes()
    assert b'positions": {' not in earlier
    assert b"contrastive" not in earlier
    assert msgspec.json.decode(earlier, type=ModelConfig) == NANO


def test_the_shipped_checkpoint_is_nano_with_towers() -> None:
    path = Path(flamingo_reference.__file__).parent / "nano" / "checkpoint" / "config.json"
    shipped = msgspec.json.decode(path.read_bytes(), type=ModelConfig)
    assert shipped.contrastive is not None
    assert msgspec.structs.replace(shipped, contrastive=None) == NANO


def test_all_faults_are_named_at_once() -> None:
    bad = smaller(NANO, resampler={"num_layers": 0}, language_model={"width": 3, "ffw_width": 0}, tokens={"pad": -1})
    with pytest.raises(ConfigError) as caught:
        bad.validate()
    for part in ("model config 'nano'", "resampler.num_layers", "language_model.ffw_width", "width 3 is odd", "tokens.pad -1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([5, 5, 3, 5, 3, 5], [0, 0, 1, 1, 2, 2]),  # text before the first image
        ([5, 5, 5], [0, 0, 0]),  # no image
        ([3, 3, 3, 5], [1, 2, 3, 3]),  # adjacent images
        ([5, 3], [0, 1]),  # image last
        ([3], [1]),
        ([3, 5] * 32, [n // 2 + 1 for n in range(64)]),  # 32 images
    ],
)
def test_phi(tokens: list[int], wanted: list[int]) -> None:
    found = phi_from_tokens(np.array([tokens, tokens[::-1]]), image_id=3)
    assert found.dtype == np.int64
    assert found[0].tolist() == wanted
    for position in range(len(tokens)):
        assert found[1, position] == sum(token == 3 for token in tokens[::-1][: position + 1])


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([3, 5, 2, 5, 3, 5], [1, 1, 1, 0, 2, 2]),  # the reset itself still sees its medium, the next medium counts on
        ([2, 3, 5], [0, 1, 1]),  # a reset before any medium
        ([3, 2, 3], [1, 1, 2]),
        ([3, 2, 2, 5], [1, 1, 0, 0]),
        ([3, 3, 2, 5], [1, 2, 2, 0]),
        ([2], [0]),
        ([3, 2], [1, 1]),
    ],
)
def test_phi_with_a_reset(tokens: list[int], wanted: list[int]) -> None:
    found = phi_from_tokens(np.array([tokens, [5] * len(tokens)]), image_id=3, reset_id=2)
    assert found.dtype == np.int64
    assert found.tolist() == [wanted, [0] * len(tokens)]
    for length in range(1, len(tokens)):  # what comes later changes nothing
        assert phi_from_tokens(np.array([tokens[:length]]), 3, 2)[0].tolist() == wanted[:length]
        if tokens[length] != 3:
            assert phi_after(np.array(tokens[:length]), found[0, :length], 2) == wanted[length]


@pytest.mark.parametrize("tokens", [np.zeros((2, 0), np.int64), np.zeros(3, np.int64)])
def test_phi_wants_rows_of_tokens(tokens: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        phi_from_tokens(tokens, image_id=3)


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_few_frames_take_the_first_embeddings(frames: int) -> None:
    found = time_weights(frames, 8)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.eye(8, dtype=np.float32)[:frames])


@pytest.mark.parametrize("frames", [9, 15, 30])
def test_many_frames_interpolate_between_the_ends(frames: int) -> None:
    """Against numpy's own interpolation of embeddings."""
    embeddings = np.random.default_rng(0).standard_normal((8, 5))
    wanted = [np.interp(np.linspace(0, 7, frames), np.arange(8), column) for column in embeddings.T]
    found = time_weights(frames, 8)
    np.testing.assert_allclose(found @ embeddings, np.array(wanted).T, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-6)
    assert (found >= 0).all()
    np.testing.assert_array_equal(found[[0, -1]], np.eye(8, dtype=np.float32)[[0, 7]])


def test_one_embedding_serves_all_frames() -> None:
    np.testing.assert_array_equal(time_weights(4, 1), np.ones((4, 1), np.float32))


def test_a_medium_has_frames() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        time_weights(0, 8)


def test_exporters_part_needs_no_torch() -> None:
    """What graphs and runtime import works where torch is not installed, and stays usable there."""
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import flamingo_reference
from flamingo_reference import config, phi, search, time_weights
from flamingo_reference import names
from flamingo_reference.checkpoints.families import native
from flamingo_reference.checkpoints.files import writer
config.SIZES["nano"].validate()
assert len(names.expected_tensors(config.SIZES["80b"])) > 1000
rules = search.Rules(eoc=0, image=1, max_new_tokens=3)
assert search.greedy(lambda ids: np.eye(4)[[2] * len(ids)], [1], rules).hypotheses[0].token_ids == (2, 2, 2)
try:
    import flamingo_reference.model
except ImportError:
    print("blocked")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "blocked", done.stderr
