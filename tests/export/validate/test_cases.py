"""Inputs that are the same everywhere, and plans whose caches and masks are what the design says."""

from __future__ import annotations

import numpy as np
import pytest

from flamingo_export.validate.expected import inputs
from flamingo_export.validate.expected.cases import PHI_CASES, TREE_CASE, decoder_cases, encoder_cases
from flamingo_export.validate.expected.decoder_calls import Plan, plan_case, strips
from flamingo_reference.config import SIZES, ModelConfig
from flamingo_reference.phi import phi_from_tokens


def test_splitmix_is_the_published_one() -> None:
    # Sebastiano Vigna's splitmix64.c from seed 0 begins with these.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = inputs.bits("", 3)  # CRC-32 of nothing is 0
    assert [int(word) for word in zero] == published


def test_drawn_numbers_are_exact_in_fp32_and_roughly_normal() -> None:
    drawn = inputs.normal("some key", (200, 500))
    assert drawn.dtype == np.float32
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.02)
    steps = drawn.astype(np.float64) / (2.0**-15 * 0.875)
    assert np.array_equal(steps, np.round(steps))
    assert not np.array_equal(drawn, inputs.normal("another key", (200, 500)))


def test_integers_stay_in_their_range() -> None:
    drawn = inputs.integers("k", 1000, 3, 9)
    assert set(drawn) == set(range(3, 9))


@pytest.mark.parametrize("size", ["nano", "3b", "9b", "80b"])
def test_every_size_has_every_case(size: str) -> None:
    config = SIZES[size]
    names = [case.name for case in decoder_cases(config)]
    assert len(names) == len(set(names))
    assert set(PHI_CASES) <= set(names)
    assert {case.subgraph for case in encoder_cases(config)} == {"vision_encoder", "resampler", "media_kv"}
    frames = [case.frames for case in encoder_cases(config) if case.subgraph == "resampler"]
    assert frames[0] == 1
    assert 1 < frames[1] <= config.resampler.num_time_embeddings < frames[2]


def patterns(config: ModelConfig, name: str) -> list[tuple[str, tuple[int, ...]]]:
    (case,) = (case for case in decoder_cases(config) if case.name == name)
    image = config.tokens.image
    return [
        ("".join("i" if token == image else "t" for token in request.tokens[: request.prompt]), request.media)
        for request in case.requests
    ]


def test_cases_are_what_their_names_say(tiny_config: ModelConfig) -> None:
    ((text_first, _),) = patterns(tiny_config, "text before the first image")
    assert text_first.startswith("tt")
    assert "i" in text_first
    assert all("i" not in pattern for pattern, _ in patterns(tiny_config, "no image"))
    assert "ii" in patterns(tiny_config, "adjacent images")[0][0]
    assert patterns(tiny_config, "image last")[0][0].endswith("i")
    ((many, rows),) = patterns(tiny_config, "32 images")
    assert many.count("i") == len(set(rows)) == 32
    ((_, shown),) = patterns(tiny_config, "one image shown twice (A, B, A)")
    assert shown == (0, 1, 0)
    shared = patterns(tiny_config, "a bank shared by requests")
    assert set(shared[0][1]) & set(shared[1][1])
    assert len({len(pattern) for pattern, _ in patterns(tiny_config, "padding and batches of different lengths")}) == 3
    lengths = [len(pattern) for pattern, _ in patterns(tiny_config, "a nearly full row beside a short one")]
    assert lengths[0] > 10 * lengths[1]


@pytest.fixture(scope="module")
def plans(tiny_config: ModelConfig) -> dict[str, Plan]:
    return {case.name: plan_case(tiny_config, case) for case in decoder_cases(tiny_config)}


@pytest.fixture(scope="module", params=[{}, {"S": 7, "M": 3}], ids=["any size", "an engine's sizes"])
def all_plans(tiny_config: ModelConfig, request: pytest.FixtureRequest) -> dict[str, Plan]:
    return {case.name: plan_case(tiny_config, case, request.param) for case in decoder_cases(tiny_config)}


def test_calls_never_write_beyond_the_cache_and_one_fills_it(all_plans: dict[str, Plan]) -> None:
    for name, plan in all_plans.items():
        ends = [int(call.feeds["write_index"].max()) + call.token_ids.shape[1] for call in plan.calls]
        assert max(ends) == plan.capacity, name


def test_each_position_sees_the_slots_of_its_own_past_and_nothing_else(all_plans: dict[str, Plan]) -> None:
    """An independent simulation of the cache: at every call, what a mask row allows must be the sequence's tokens before it."""
    for name, plan in all_plans.items():
        held: list[dict[int, tuple[int, int]]] = [{} for _ in range(plan.batch)]
        tokens = [sequence.tokens for sequence in plan.sequences]
        for call in plan.calls:
            batch, width = call.token_ids.shape
            for b in range(batch):
                for s in range(width):
                    slot = int(call.feeds["write_index"][b]) + s
                    token, position = int(call.token_ids[b, s]), int(call.feeds["positions"][b, s])
                    held[b][slot] = (token, position)
            for b in range(batch):
                for s in range(width):
                    seen = np.flatnonzero(call.feeds["mask"][b, 0, s]).tolist()
                    sequence, position = call.origin[b, s].tolist()
                    own = int(call.feeds["write_index"][b]) + s
                    if sequence < 0:
                        assert seen == [own], name
                        continue
                    found = sorted((held[b][slot] for slot in seen), key=lambda entry: entry[1])
                    assert found == [(token, at) for at, token in enumerate(tokens[sequence][: position + 1])], name
                    assert own in seen
                    for slot in seen:
                        assert call.feeds["key_positions"][b, slot] == held[b][slot][1], name


def test_phi_and_rows_point_at_the_last_image_before(all_plans: dict[str, Plan], tiny_config: ModelConfig) -> None:
    image = tiny_config.tokens.image
    for name, plan in all_plans.items():
        for call in plan.calls:
            for b, s in np.argwhere(call.origin[:, :, 0] >= 0).tolist():
                sequence, position = call.origin[b, s].tolist()
                media = plan.sequences[sequence].media
                count = plan.sequences[sequence].tokens[: position + 1].count(image)
                phi = int(call.feeds["phi"][b, s])
                assert (phi == 0) == (count == 0), name
                if phi:
                    assert call.feeds["media_rows"][b, phi - 1] == media[count - 1], name


def test_decoding_calls_carry_one_medium(plans: dict[str, Plan]) -> None:
    last = plans["32 images"].calls[-1]
    assert last.feeds["media_rows"].shape[1] == 1


def test_calls_keep_to_an_engines_sizes(tiny_config: ModelConfig) -> None:
    (case,) = (case for case in decoder_cases(tiny_config) if case.name == "32 images")
    whole, bounded = (plan_case(tiny_config, case, largest).calls for largest in ({}, {"S": 7, "M": 3}))
    assert whole[0].feeds["media_rows"].shape[1] == 32
    assert max(call.feeds["media_rows"].shape[1] for call in bounded) == 2  # an image and a text token in turn, 3 positions
    assert max(call.token_ids.shape[1] for call in bounded) == 3


def test_tree_covers_every_leaf_and_crosses_parents(plans: dict[str, Plan]) -> None:
    plan = plans[TREE_CASE]
    assert len(plan.sequences) > 3  # some beams die on the way
    assert len(set(plan.sequences)) == len(plan.sequences)
    beams = [call for call in plan.calls if call.token_ids.shape == (1, 3)]
    assert len(beams) == 4
    crossing = [call.feeds["mask"][0, 0] for call in beams[1:]]
    assert any(not np.array_equal(mask[0], mask[1]) for mask in crossing)


def test_chunks_split_the_prompt(plans: dict[str, Plan]) -> None:
    widths = [call.token_ids.shape[1] for call in plans["chunked prefill"].calls]
    assert widths[:3] == [8, 8, 8]
    assert widths[-3:] == [1, 1, 1]


def test_rows_leave_or_stay_in_the_batch_as_asked(plans: dict[str, Plan]) -> None:
    leaving = [call.token_ids.shape[0] for call in plans["a nearly full row beside a short one"].calls]
    staying = [call.token_ids.shape[0] for call in plans["padding and batches of different lengths"].calls]
    assert leaving[1] == 1
    assert set(staying) == {3}


def test_strips_follow_phi(tiny_config: ModelConfig) -> None:
    (case,) = (case for case in decoder_cases(tiny_config) if case.name == "one image shown twice (A, B, A)")
    (strip,) = strips(tiny_config, case)
    assert strip.tokens == (-1, 1, 1, -2, 2, 2, -1, 1, 1, 1, 1, 1)
    assert strip.prompt == 9
    phi = phi_from_tokens(np.asarray([case.requests[0].tokens]), tiny_config.tokens.image)
    assert phi[0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
