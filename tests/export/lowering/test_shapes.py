"""Bounds of the sizes: one table a profile, from the limits; contradictions are refused."""

from __future__ import annotations

import msgspec
import pytest

from flamingo_export.backends.tensorrt.lowering.shapes import Bounds, profiles, shape_of, symbols
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import BuildError
from flamingo_export.specs import TensorSpec, decoder_spec, subgraph_specs

LIMITS = ShapeLimits(max_length=300, chunk=64, bank_rows=16, batch=4, beams=6, frames=8, video_frames=30, chunk_media=12)


def test_the_decoder_is_tuned_for_prefill_and_decoding(tiny_config):
    prefill, decode, alone = profiles(subgraph_specs(tiny_config)["decoder"], LIMITS)
    assert (prefill.name, decode.name, alone.name) == ("prefill", "decode.4", "decode.1")
    assert (prefill.bounds["B"], decode.bounds["B"], alone.bounds["B"]) == (Bounds(1, 1, 4), Bounds(1, 4, 4), Bounds(1, 1, 2))
    assert prefill.bounds["S"] == Bounds(1, 64, 64)
    assert prefill.bounds["M"] == Bounds(1, 1, 12)
    assert decode.bounds["S"] == Bounds(1, 3, 6)
    assert decode.bounds["M"] == Bounds(1, 1, 1)
    for profile in (prefill, decode, alone):
        assert profile.bounds.keys() == {"B", "S", "M", "N", "K"}
        assert all(1 <= each.least <= each.usual <= each.most for each in profile.bounds.values())


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, [1]), (2, [2, 1]), (8, [8, 1]), (9, [9, 8, 1]), (64, [64, 8, 1])]
)  # fmt: skip
def test_steps_are_tuned_for_one_row_a_few_and_the_most(tiny_config, batch, rows):
    """The widest comes first: a call is served by the last profile that it fits, which is the narrowest."""
    limits = ShapeLimits(max_length=300, chunk=64, batch=batch)
    decoding = profiles(subgraph_specs(tiny_config)["decoder"], limits)[1:]
    assert [profile.bounds["B"].usual for profile in decoding] == rows
    # Two at least, where there are two: some attentions do not compile for a batch that can only be one beside others that vary.
    assert [profile.bounds["B"].most for profile in decoding] == [max(usual, min(batch, 2)) for usual in rows]


def test_shared_rows_have_a_profile_of_their_own(tiny_config):
    limits = msgspec.structs.replace(LIMITS, branches=24, branch_media=5)
    prefill, shared, *narrower = profiles(subgraph_specs(tiny_config)["decoder"], limits)
    assert shared.name == "decode.shared"
    assert shared.bounds == {
        "B": Bounds(1, 1, 4), "S": Bounds(1, 24, 24), "M": Bounds(1, 5, 5), "K": Bounds(1, 24, 24), "N": Bounds(1, 16, 16)
    }  # fmt: skip
    assert (prefill, *narrower) == profiles(subgraph_specs(tiny_config)["decoder"], LIMITS)


def test_a_part_has_the_symbols_it_uses(tiny_config):
    spec = decoder_spec(tiny_config, range(1, 2), name="decoder.1")
    assert symbols(spec) == {"B", "S"}
    assert all(profile.bounds.keys() == {"B", "S"} for profile in profiles(spec, LIMITS))


def test_media_subgraphs_take_as_many_frames_as_the_runtime_sends(tiny_config):
    from flamingo_export.runtime.media_encoder import MAX_FRAMES_AT_ONCE

    assert ShapeLimits(max_length=1).frames == MAX_FRAMES_AT_ONCE
    specs = subgraph_specs(tiny_config)
    assert profiles(specs["vision_encoder"], LIMITS)[0].bounds == {"F": Bounds(1, 1, 8)}
    videos, images = profiles(specs["resampler"], LIMITS)
    for frames in range(1, 31):  # media side by side: max(1, 8 // frames)
        media = max(1, MAX_FRAMES_AT_ONCE // frames)
        fits = [each for each in (videos, images) if each.bounds["T"].most >= frames and each.bounds["N"].most >= media]
        assert fits, frames


def test_shapes_come_from_one_table():
    assert shape_of(TensorSpec("mask", "bool", ("B", 1, "S", "C")), {"B": 2, "S": 3, "C": 10}) == (2, 1, 3, 10)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (ShapeLimits(max_length=64, chunk=64), "leaves no room beside a chunk of 64"),
        (ShapeLimits(max_length=300, batch=0), "batch is 0"),
        (ShapeLimits(max_length=8, chunk=4, beams=9), "or 9 beams"),
        (ShapeLimits(max_length=24, chunk=4, branches=24), "beside 24 branches of a shared row"),
    ],
)
def test_limits_that_contradict_each_other(tiny_config, limits, said):
    with pytest.raises(BuildError, match=said):
        profiles(subgraph_specs(tiny_config)["decoder"], limits)
