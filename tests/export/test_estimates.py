"""One estimate of memory: what is measured lies below it, all who ask get the same answer, and the precision counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from flamingo_export import estimates
from flamingo_export.bundle.manifest import ShapeLimits, default_limits
from flamingo_export.cli.build import _print_plan
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.pipeline.plan import plan, this_machine
from flamingo_export.precision import Policy, Precision, StorageType
from flamingo_export.quantize.policies import preset
from flamingo_export.sources.choice import RandomWeights, source_for_size
from flamingo_export.validate.environment import is_small
from flamingo_export.weights import WeightIndex
from flamingo_reference.checkpoints.families import llama_vision
from flamingo_reference.config import SIZES, ModelConfig

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "open_memory.json").read_text())


def index(size: str, storage: StorageType, policy: str | None = None) -> WeightIndex:
    precision = Precision(storage=storage, policy=preset(policy) if policy else None)
    return WeightIndex.planned(SIZES[size], precision)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_what_was_measured_is_below_the_estimate_and_not_far_below(kind: str) -> None:
    """benchmarks/open_memory.py, whose numbers are over a process that has everything imported."""
    found = MEASURED[kind]
    assert found["peak"] <= found["estimate"]
    assert found["estimate"] - estimates.PROGRAM <= 1.4 * found["peak"]


def test_9b_in_int4_takes_a_tenth_of_what_its_parameters_would_in_fp32() -> None:
    """The weights that `load` opens: 8.7 GB. Parity once went by 8.5 bytes per parameter, whatever the precision: 96 GB."""
    whole = index("9b", "bf16", "int4")
    assert estimates.opened_weights(whole) == pytest.approx(8.68e9, rel=0.01)
    assert estimates.running(SIZES["9b"], whole) < 16e9
    assert estimates.running(SIZES["9b"], index("9b", "bf16")) > 4 * 10.9e9


def test_the_precision_counts_in_every_estimate_that_it_bears_on() -> None:
    config = SIZES["3b"]
    sizes = [estimates.running(config, index("3b", "bf16", policy)) for policy in ("int4", "int8", "fp8")]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2 * sizes[0]
    plain, quantised = Precision(storage="bf16"), Precision(storage="bf16", policy=preset("int4"))
    assert estimates.quantised_copies(config, plain) < estimates.quantised_copies(config, quantised)
    limits = ShapeLimits(max_length=2048)
    assert estimates.device(config, quantised, limits) < 0.7 * estimates.device(config, plain, limits)


def test_a_cache_by_hand() -> None:
    lm = SIZES["nano"].language_model
    assert estimates.cache_bytes(SIZES["nano"], positions=7, width=2) == 7 * 2 * 2 * lm.num_layers * lm.num_heads * lm.head_size


def test_cards_of_a_plan_by_hand() -> None:
    """3b in bf16 with small limits: 6.6 GB of engines; 92 % of a card is left to them."""
    request = BuildRequest(
        source=source_for_size("3b"), out=Path("b.bundle"), limits=ShapeLimits(max_length=256, bank_rows=1, batch=1)
    )
    found = plan(request)
    assert found.device_bytes == pytest.approx(6.7e9, rel=0.05)
    assert {card.name: card.count for card in found.cards}["RTX 4090"] == 1
    large = plan(BuildRequest(source=source_for_size("80b"), out=Path("b.bundle"), limits=request.limits))
    counts = {card.name: (card.memory, card.count) for card in large.cards}
    assert counts["RTX 4090"] == (24_000_000_000, math.ceil(large.device_bytes / (0.92 * 24e9)))
    assert counts["H100"][1] == 3  # 157.7 GB over 73.6
    assert counts["H200"][1] == 2


def test_seconds_of_a_plan_by_hand() -> None:
    """18 ns per number drawn, hashed and written; int4 16 ns more per number that it quantises."""
    found = plan(BuildRequest(source=RandomWeights(config=SIZES["nano"], seed=0), out=Path("b.bundle")))
    (step,) = found.steps
    numbers = found.weight_bytes / 4
    assert step.seconds == pytest.approx(18e-9 * numbers, rel=0.01)
    quantised = plan(BuildRequest(source=source_for_size("nano"), out=Path("b.bundle"), policy=preset("int4")))
    assert 18e-9 * numbers < quantised.steps[-1].seconds < (18e-9 + 16e-9) * numbers


def test_nano_is_small_and_3b_is_not() -> None:
    assert is_small(SIZES["nano"])
    assert not is_small(SIZES["3b"])


def test_shortages_are_told_in_one_unit() -> None:
    assert estimates.shortage("it", 5, 5) == ""
    assert estimates.shortage("running it", 3 << 30, 1 << 30) == "running it takes about 3.0 GiB of memory, 1.0 GiB may be used"


@pytest.mark.parametrize(
    ("needed", "available", "said"),
    [
        ((9 << 30) + 1, 9 << 30, ("9.1 GiB", "9.0 GiB")),
        (9_900_000_000, 9_890_000_000, ("9.3 GiB", "9.2 GiB")),
        ((70 << 20) + 1, 70 << 20, ("71 MiB", "70 MiB")),
        (1, 0, ("1 MiB", "0 MiB")),
    ],
)
def test_what_is_needed_and_what_is_there_are_never_said_alike(needed: int, available: int, said: tuple[str, str]) -> None:
    assert estimates.rounded_apart(needed, available) == said
    assert all(f" {each} " in estimates.shortage("it", needed, available).replace(",", " ,") for each in said)


def tiled_11b() -> ModelConfig:
    """Llama 3.2 Vision 11B: the defaults of its config.json, but for the size of images."""
    return llama_vision.config_from({"text_config": {}, "vision_config": {"image_size": 560}}, name="llama-3.2-11b-vision")


def test_a_bank_of_tiles_by_hand() -> None:
    """Llama 3.2 Vision 11B: 8 gated layers of 8 heads of 128, 1601 keys a tile: an image of 4 tiles takes 210 MB in 16 bits."""
    config = tiled_11b()
    assert estimates.media_bytes(config, rows=4, width=2) == 2 * 8 * 8 * 1601 * 128 * 4 * 2 == 209_846_272
    fp16, fp8 = (
        Precision(storage="bf16", policy=policy) for policy in (None, Policy(name="coded media", rules=(), media="fp8"))
    )
    assert (estimates.media_row(config, fp16), estimates.media_row(config, fp8)) == (209_846_272 // 4, 209_846_272 // 8)
    limits = default_limits(config)
    assert (limits.bank_rows, limits.max_tiles, limits.max_length) == (32, 16, 8192)
    less = msgspec.structs.replace(limits, bank_rows=28)
    assert estimates.device(config, fp16, limits) - estimates.device(config, fp16, less) == 209_846_272


def test_a_plan_counts_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiled_11b()
    request = BuildRequest(source=RandomWeights(config=config), out=Path("x.bundle"), storage="bf16")
    found = plan(request)
    assert (found.bank.rows, found.bank.rows_of_image, found.bank.row_bytes) == (32, 4, 52_461_568)
    _print_plan(found, this_machine(found), None, as_json=False)
    assert "media bank: 32 tiles, 50.0 MiB each, 1.6 GiB in all: 8 images of 4 tiles" in capsys.readouterr().out
    nano = plan(msgspec.structs.replace(request, source=RandomWeights(config=SIZES["nano"])))
    _print_plan(nano, this_machine(nano), None, as_json=False)
    assert "media bank: 64 images or videos, 24.0 KiB each, 1.5 MiB in all\n" in capsys.readouterr().out


def test_what_running_takes_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """11B in int4 on a CPU, short request about an image of 4 tiles: measured 10.5 GiB (docs/llama_vision.md). 90B in FP8 on a GPU."""
    config, precision = tiled_11b(), Precision(storage="bf16", policy=preset("int4"))
    found = estimates.on_cpu(config, WeightIndex.planned(config, precision), requests=1, positions=512, media=4)
    assert found.cache == 2 * 32 * 8 * 128 * 512 * 4
    assert found.bank == 2 * 209_846_272
    assert found.total == found.weights + found.cache + found.bank + found.work
    assert 0.9 * 10.5 <= found.total / estimates.GIB <= 1.1 * 10.5
    two = estimates.on_cpu(config, WeightIndex.planned(config, precision), requests=2, positions=512, media=4)
    assert two.total - found.total == found.cache
    request = BuildRequest(source=source_for_size("llama-3.2-90b-vision"), out=Path("x.bundle"), policy=preset("fp8"))
    planned = plan(request)
    whole = planned.runs[-1]
    assert (whole.where, whole.needs.requests, whole.needs.positions, whole.needs.media) == ("GPU", 8, 8192, 32)
    assert whole.needs.weights == int(1.05 * planned.weight_bytes)
    assert whole.needs.cache == 2 * 80 * 8 * 128 * 8 * 8192 * 2
    assert whole.needs.bank == 8 * 524_615_680
    assert whole.total == planned.device_bytes
    _print_plan(planned, this_machine(planned), None, as_json=False)
    assert "memory to run it, about" in capsys.readouterr().out


def test_tables_of_which_rows_are_read_stay_in_their_files() -> None:
    """The embedding of a model with a head of its own. A tied one is there as a table, and widened as the head's matrix."""
    config = tiled_11b()
    whole = WeightIndex.planned(config, Precision(storage="bf16"))
    tables = ("decoder/embedding", "vision_encoder/tile_position_embedding")
    assert estimates.opened_weights(whole) == sum(4 * math.prod(whole[name].shape) for name in whole if name not in tables)
    tied = index("3b", "bf16")
    assert "decoder/head" not in tied
    extra = tied["decoder/embedding"].length
    assert estimates.opened_weights(tied) == sum(4 * math.prod(tied[name].shape) for name in tied) + extra
