"""Limits by the card's memory, and what a plan says of cards: by hand, from the bytes of weights, caches and bank."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from flamingo_export import estimates
from flamingo_export.bundle.manifest import ShapeLimits, default_limits
from flamingo_export.cli import main
from flamingo_export.errors import BuildError
from flamingo_export.pipeline.build_request import BuildRequest, resolve_limits
from flamingo_export.pipeline.card import CARDS, MOST_ROWS, USABLE, Card, chosen_limits, cuts, read_card
from flamingo_export.pipeline.plan import plan
from flamingo_export.precision import Precision
from flamingo_export.quantize.policies import preset
from flamingo_export.sources.choice import source_for_size
from flamingo_reference.config import SIZES

FP8 = Precision(storage="bf16", policy=preset("fp8"))
BF16 = Precision(storage="bf16")


@pytest.mark.parametrize(
    ("text", "name", "memory", "count"),
    [
        ("H200", "H200", 141e9, 1),
        ("h200", "H200", 141e9, 1),
        ("rtx4090", "RTX 4090", 24e9, 1),
        ("RTX 4090", "RTX 4090", 24e9, 1),
        ("4090", "RTX 4090", 24e9, 1),
        ("thor", "Jetson AGX Thor", 128e9, 1),
        ("2xH100", "H100", 80e9, 2),
        ("3 x h100", "H100", 80e9, 3),
        ("48GB", "a card of 48 GB", 48e9, 1),
        ("2x40.5gb", "a card of 40.5 GB", 40.5e9, 2),
    ],
)
def test_cards_by_name_or_memory(text, name, memory, count):
    assert read_card(text) == Card(name=name, memory=int(memory), count=count)


@pytest.mark.parametrize(
    "text", ["", "H201", "0xH100", "0GB", "GB", "-1GB", "1e9GB", "2x", "H200; rm", "\u0661GB", "x" * 10_000]
)
def test_what_is_no_card(text):
    with pytest.raises(BuildError, match=r"is not a card\. Name one of L4, RTX 4090, .*or its memory: 48GB; several as 2xH100"):
        read_card(text)


def rows_by_hand(memory: float, precision: Precision, limits: ShapeLimits, size: str = "9b") -> int:
    """Requests whose caches fit beside engines and bank, by the difference of two estimates."""
    config = SIZES[size]
    one, two = (estimates.device(config, precision, msgspec.structs.replace(limits, batch=rows)) for rows in (1, 2))
    return int((USABLE * memory - (one - (two - one))) // (two - one))


@pytest.mark.parametrize("card", CARDS)
def test_as_many_requests_as_fit_and_no_more(card):
    config = SIZES["9b"]
    limits, said = chosen_limits(config, FP8, length=None, batch=None, parts=1, card=read_card(card))
    rows = rows_by_hand(CARDS[card], FP8, limits)
    assert limits.max_length == default_limits(config).max_length == 4096
    assert limits.batch == max(power for power in (1, 2, 4, 8, 16, 32, 64) if power <= min(rows, MOST_ROWS))
    assert said is not None
    assert f"{limits.batch} requests of 4096 cache slots, as {card} (" in said
    assert estimates.device(config, FP8, limits) <= USABLE * CARDS[card]


def test_a_card_too_small_for_the_models_length_gets_a_shorter_cache():
    config, length = SIZES["9b"], 4096
    one = estimates.device(config, FP8, msgspec.structs.replace(default_limits(config), batch=1))
    row = estimates.cache_bytes(config, positions=length, width=2)
    card = Card(name="a card", memory=int((one - 0.6 * row) / USABLE) + 10)
    limits, said = chosen_limits(config, FP8, length=None, batch=None, parts=1, card=card)
    assert (limits.max_length, limits.batch) == (1024, 1)
    assert limits.chunk == 128
    assert said is not None
    assert "engines take 1 request of 1024" in said


def test_what_was_asked_for_stays():
    config, card = SIZES["9b"], read_card("H200")
    both, said = chosen_limits(config, FP8, length=2048, batch=3, parts=1, card=card)
    assert (both.max_length, both.batch, said) == (2048, 3, None)
    batch, _ = chosen_limits(config, FP8, length=None, batch=3, parts=1, card=card)
    assert (batch.max_length, batch.batch) == (4096, 3)
    length, _ = chosen_limits(config, FP8, length=1024, batch=None, parts=1, card=card)
    assert (length.max_length, length.batch) == (1024, 64)
    given = ShapeLimits(max_length=777, batch=5)
    request = BuildRequest(source=source_for_size("9b"), out=Path("b"), limits=given, card=card)
    assert resolve_limits(request, config, BF16, None) == (given, None)
    known, said = chosen_limits(config, BF16, length=None, batch=None, parts=1, card=None)
    assert (known, said) == (default_limits(config), None)


def test_a_model_that_no_limits_make_fit_is_said_so():
    limits, said = chosen_limits(SIZES["80b"], BF16, length=None, batch=None, parts=1, card=read_card("RTX 4090"))
    assert limits == default_limits(SIZES["80b"])
    assert said is not None
    assert "do not fit on RTX 4090: --plan says" in said
    several, said = chosen_limits(SIZES["80b"], FP8, length=None, batch=None, parts=2, card=read_card("2xH100"))
    assert several.batch == 4
    assert said is not None
    assert "as 2 x H100 (80 GB) holds" in said


def test_engines_for_this_machines_card(monkeypatch):
    """The card that is here counts where engines are for it, and not for another target."""
    from flamingo_export.backends.registry import get_compiler
    from flamingo_export.backends.tensorrt import library

    monkeypatch.setattr(library, "device", lambda index=0: library.Device(target="sm90", memory=int(141e9)))
    request = BuildRequest(source=source_for_size("9b"), out=Path("b"), policy=preset("fp8"), backend="tensorrt")
    limits, said = resolve_limits(request, SIZES["9b"], FP8, get_compiler("tensorrt"))
    assert limits.batch == 32
    assert said is not None
    assert "this machine's GPU (141 GB)" in said
    other = resolve_limits(request, SIZES["9b"], FP8, get_compiler("tensorrt-rtx", target="sm89"))
    assert other == (default_limits(SIZES["9b"]), None)


@pytest.mark.parametrize("card", ["L40S", "A100", "H200"])
def test_what_is_computed_on_the_way_is_counted_for_every_request(card):
    """As many requests as the plan says one card holds take what running them is said to take: engines for one more would not fit."""
    config, limits = SIZES["9b"], msgspec.structs.replace(default_limits(SIZES["9b"]), batch=64)
    request = BuildRequest(source=source_for_size("9b"), out=Path("b"), policy=preset("fp8"), backend="tensorrt", limits=limits)
    found = plan(request)
    (planned,) = (each for each in found.cards if each.name == card)
    assert planned.least == 1

    def taken(rows: int) -> int:
        built = msgspec.structs.replace(limits, batch=rows)
        return estimates.on_gpu(config, FP8, built, requests=rows, positions=4096, media=limits.bank_rows).total

    assert taken(planned.rows) <= USABLE * CARDS[card] < taken(planned.rows + 1)
    assert found.runs[-1].total == found.device_bytes == taken(64)
    assert found.memory[-1].bytes[-1] == taken(64)


def test_several_cards_have_room_for_what_each_computes():
    """14 L4, and not as many as their memory would hold by its sum: each of them computes for all 64 requests."""
    limits = msgspec.structs.replace(default_limits(SIZES["9b"]), batch=64)
    request = BuildRequest(source=source_for_size("9b"), out=Path("b"), policy=preset("fp8"), backend="tensorrt", limits=limits)
    (planned,) = (each for each in plan(request).cards if each.name == "L4")
    needed = cuts(SIZES["9b"], FP8, limits).in_parts(planned.parts or 0)
    work = 64 * estimates.work_of_row(SIZES["9b"], FP8, limits)
    assert planned.count is not None
    for names in planned.graphs:
        assert sum(needed[name].total(64) for name in names) + work <= USABLE * CARDS["L4"]
    assert work > 0.08 * CARDS["L4"]  # more than what is kept free of a card


@pytest.mark.slow
def test_80b_over_two_and_three_cards():
    """In FP8 over two cards of 80 GB, in bf16 over three: parts in order, each with a share of the bytes."""
    for precision, count in ((preset("fp8"), 2), (None, 3)):
        found = plan(BuildRequest(source=source_for_size("80b"), out=Path("b"), policy=precision, backend="tensorrt"))
        card = next(card for card in found.cards if card.name == "H100")
        assert (card.least, card.least_parts, card.rows) == (count, count, 5)
        assert card.count == count + 1
        assert [name for names in card.graphs for name in names if name.startswith("decoder")] == [
            f"decoder.{part}" for part in range(count + 1)
        ]


@pytest.mark.slow
def test_on_the_command_line(capfd):
    from flamingo_export.cli.output import human_bytes

    assert main(
        ["build", "--size", "9b", "--fp8", "--backend", "tensorrt", "--card", "h200", "--plan", "--out", "b.bundle"]
    ) in (0, 1)
    shown = capfd.readouterr().out
    assert "engines take 32 requests of 4096 cache slots, as H200 (141 GB) holds" in shown
    assert "GPUs for 32 requests of 4096 slots" in shown
    limits = msgspec.structs.replace(default_limits(SIZES["9b"]), batch=64, max_length=1024)
    assert human_bytes(estimates.device(SIZES["9b"], FP8, limits)) in shown
    assert main(["build", "--size", "9b", "--fp8", "--backend", "tensorrt", "--card", "h200", "--plan", "--json"]) in (0, 1)
    found = json.loads(capfd.readouterr().out)
    assert found["limits"]["batch"] == 32
    assert {card["name"] for card in found["cards"]} == set(CARDS)
    assert main(["build", "--size", "9b", "--card", "h200", "--plan"]) == 2
    assert "only engines are for a card" in capfd.readouterr().err
    assert main(["build", "--size", "9b", "--backend", "tensorrt", "--card", "h201", "--plan"]) == 1
    assert "is not a card" in capfd.readouterr().err
