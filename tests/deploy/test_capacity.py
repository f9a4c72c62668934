"""Capacity: costs between what was measured, queues that theory knows the answer of, fleets that are as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.cli import main
from flamingo_export.deploy.capacity.costs import StepCosts, read_bench
from flamingo_export.deploy.capacity.load import BURST, Load, arrivals
from flamingo_export.deploy.capacity.plan import Fleet, Planner
from flamingo_export.deploy.capacity.simulate import requests, simulate
from flamingo_export.errors import InputError


def costs(**changed: Any) -> StepCosts:
    """Made-up costs: a step is 10 ms and 1 ms more for each branch beyond the first."""
    rows, widths, slots = (1, 4, 16), (1, 3), (128, 512)
    made: dict[str, Any] = {
        "rows": rows,
        "widths": widths,
        "slots": slots,
        "decode": tuple(tuple(tuple(0.009 + 0.001 * r * w for _ in slots) for w in widths) for r in rows),
        "chunks": (8, 256),
        "prefill": ((0.010, 0.010), (0.050, 0.050)),
        "frames": (1, 8),
        "encode": (0.005, 0.020),
        "copy_slot": 1e-6,
        "prepare_image": 0.0,
        "limits": ShapeLimits(max_length=1024),
    }
    return StepCosts(**{**made, **changed})


def test_costs_are_linear_between_measurements_and_beyond():
    rng = np.random.default_rng(0)
    table = rng.uniform(1, 2, (3, 2, 2))
    made = costs(decode=tuple(tuple(map(tuple, part)) for part in table.tolist()))
    oracle = RegularGridInterpolator((made.rows, made.widths, made.slots), table, bounds_error=False, fill_value=None)
    for point in [(1, 1, 128), (2, 1, 128), (9, 2, 300), (16, 3, 512), (20, 3, 640), (1, 4, 64)]:
        assert made.decoding(*point) == pytest.approx(float(oracle(point)))
    assert costs(widths=(1,), decode=tuple(((0.01, 0.02),) for _ in range(3))).decoding(4, 7, 320) == pytest.approx(0.015)


def test_an_extrapolation_never_becomes_free():
    falling = costs(encode=(0.020, 0.001))
    assert falling.encoding(100) == 0.25 * 0.001


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_a_queue_with_one_row_waits_as_theory_says(load):
    """One server, constant service: each request waits for what is left of those before it (Lindley's recursion)."""
    asked = requests(Load(prompt=(8, 8), new_tokens=(10, 10), images=0), 400, seed=1)
    service = 0.010 + 9 * 0.010  # the prompt gives the first token, nine steps the others
    arrived = arrivals("poisson", load / service, len(asked), 2)
    found = simulate(costs(), asked, arrived, beams=1, rows=1, queue=None)
    waits = [0.0]
    for gap in np.diff(arrived):
        waits.append(max(0.0, waits[-1] + service - gap))
    # A prompt that by chance begins as another row's computes a position less.
    np.testing.assert_allclose(found.answer, np.array(waits) + service, rtol=0.02)
    assert found.busy == pytest.approx(400 * service / found.seconds, rel=0.01)
    assert found.running == pytest.approx(found.busy, rel=0.01)


def test_rows_side_by_side_share_steps():
    asked = requests(Load(prompt=(8, 8), new_tokens=(40, 40), images=0), 64, seed=1)
    at_once = np.zeros(64)
    one, many = (simulate(costs(), asked, at_once, beams=1, rows=rows, queue=None) for rows in (1, 16))
    assert one.spent["decode"] == pytest.approx(64 * 39 * 0.010)
    # 16 rows: 25 ms a step in place of 16 times 10.
    assert many.spent["decode"] / one.spent["decode"] == pytest.approx(25 / 160, rel=0.25)
    assert one.tokens == many.tokens == 64 * 40


def test_what_is_shared_is_computed_once_and_copied():
    own, shared = (
        simulate(
            costs(), requests(load, 20, 1), np.arange(20, dtype=np.float64) * 0.02, beams=1, rows=4, queue=None
        )
        for load in (Load(prompt=(200, 200), images=4), Load(prompt=(200, 200), images=4, shared_prompt=190, shared_images=4))
    )  # fmt: skip
    assert shared.spent["encode"] < own.spent["encode"] / 15
    assert shared.spent["prefill"] < own.spent["prefill"] / 2


def test_beams_cost_their_width():
    asked = requests(Load(prompt=(8, 8), new_tokens=(10, 10), images=0), 1, seed=1)
    found = simulate(costs(), asked, np.zeros(1), beams=3, rows=4, queue=None)
    assert found.spent["decode"] == pytest.approx(9 * 0.012)


def test_a_full_queue_refuses():
    asked = requests(Load(prompt=(8, 8), new_tokens=(10, 10), images=0), 50, seed=1)
    found = simulate(costs(), asked, np.zeros(50), beams=1, rows=2, queue=8)
    assert found.refused == 40
    assert np.isnan(found.answer).sum() == 40


def test_time_to_decode_images_comes_before():
    asked = requests(Load(prompt=(8, 8), new_tokens=(10, 10), images=0), 1, seed=1)
    found = simulate(costs(), asked, np.zeros(1), beams=1, rows=1, queue=None, prepare=0.5)
    assert found.answer[0] == pytest.approx(0.6)


def test_arrivals_have_their_rate_and_pattern():
    for pattern in ("poisson", "bursts", "day"):
        found = arrivals(pattern, 10, 20_000, 3)
        assert len(found) == 20_000
        assert (np.diff(found) >= 0).all()
        assert len(found) / found[-1] == pytest.approx(10, rel=0.05)
    # Arrivals a second: independent ones vary as much as there are, bursts of a geometric number 2 BURST - 1 times that.
    for pattern, expected in (("poisson", 1.0), ("bursts", 2 * BURST - 1)):
        counts = np.bincount((arrivals(pattern, 10, 200_000, 4) / 10).astype(int))[:-1]
        assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.15)
    day = arrivals("day", 10, 50_000, 5)
    hours, _ = np.histogram(day, 24, (0, 5000))
    assert hours.argmax() in (11, 12)
    assert hours.max() / hours.mean() == pytest.approx(1.8, rel=0.05)
    with pytest.raises(InputError, match="poisson, bursts, day"):
        arrivals("weekly", 1, 10, 0)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["poisson", "bursts"])
def test_a_fleet_keeps_the_promise_and_one_less_does_not(pattern):
    load = Load(prompt=(32, 64), new_tokens=(8, 16), images=1)
    planner = Planner(costs(), load, pattern, 0.8, Fleet(rows=8, count=200))
    found = planner.plan(60)
    assert found.answer_p95 <= 0.8
    assert found.replicas > 1
    fewer = planner._observed(planner._arrived(60, found.replicas - 1), planner._asked)
    assert fewer.percentile(0.95) > 0.8 or fewer.refused
    ten_times = planner.plan(600).replicas
    # A burst that goes to many replicas is a small one for each, so large fleets need fewer for the same.
    assert (9 if pattern == "poisson" else 5) * found.replicas <= ten_times <= 10 * found.replicas
    if pattern == "poisson":  # a burst as a whole keeps several busy, however rare it is
        assert planner.plan(1).replicas == 1


@pytest.mark.slow
def test_a_day_is_sized_for_its_noon_and_priced_by_its_hours():
    load = Load(prompt=(32, 32), new_tokens=(8, 8), images=0)
    day, flat = (
        Planner(costs(), load, pattern, 0.8, Fleet(rows=8, price=2.0, count=120)).plan(100) for pattern in ("day", "poisson")
    )
    assert day.replicas == pytest.approx(1.8 * flat.replicas, rel=0.2)
    assert flat.replica_hours == 24 * flat.replicas
    assert flat.replica_hours <= day.replica_hours < 24 * day.replicas
    assert day.price_an_hour is not None
    assert day.price_an_hour == pytest.approx(2.0 * day.replica_hours / 24)
    assert day.price_per_thousand == pytest.approx(day.price_an_hour / 360)


def test_what_cannot_be_promised_is_refused():
    with pytest.raises(InputError, match=r"a single request takes .* No number of replicas helps"):
        Planner(costs(), Load(prompt=(8, 8), new_tokens=(100, 100), images=0), "poisson", 0.5, Fleet(rows=8, count=100))
    for load, text in (
        (Load(prompt=(1000, 1000)), "cache slots"),
        (Load(images=65), "bank holds 64"),
        (Load(prompt=(300, 200)), "not a range"),
        (Load(images=1, shared_images=2, shared_prompt=10), "cannot be shared"),
        (Load(shared_prompt=256), "does not fit"),
        (Load(prompt=(10, 10), images=20), "no room"),
    ):
        with pytest.raises(InputError, match=text):
            load.check(1024, 64)


def benched(path: Path, grid: StepCosts | None) -> Path:
    head = {"bundle": "n.bundle", "model": "nano", "backend": "onnxruntime", "cores": 2, "grid": grid}
    path.write_bytes(msgspec.json.encode(head))
    return path


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    file = benched(tmp_path / "bench.json", costs())
    line = [
        "capacity",
        "--bench",
        str(file),
        "--rate",
        "2",
        "--rate",
        "30",
        "--p95",
        "1",
        "--prompt",
        "16:32",
        "--requests",
        "100",
    ]
    assert main([*line, "--price", "0.5", "--gpus", "0.5", "--json"]) == 0
    one, more = json.loads(capsys.readouterr().out)
    assert (one["rate"], one["replicas"], one["gpus"], one["price_an_hour"]) == (2.0, 1, 0.5, 0.5)
    assert more["answer_p95"] <= 1
    assert main([*line, "--arrivals", "day"]) == 0
    assert "replica hours a day" in capsys.readouterr().out


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    rest = ["--rate", "1", "--p95", "1"]
    for content, text in (
        (b"{", "is not what bench writes"),
        (msgspec.json.encode({"bundle": "n", "model": "n", "backend": "b", "cores": 1}), "--json --grid"),
        (
            msgspec.json.encode({"bundle": "n", "model": "n", "backend": "b", "cores": 1, "grid": costs(rows=(4, 1, 16))}),
            "rows is",
        ),
        (msgspec.json.encode({"bundle": "n", "model": "n", "backend": "b", "cores": 1, "grid": costs(frames=(1,))}), "encode"),
    ):
        (tmp_path / "bench.json").write_bytes(content)
        assert main(["capacity", "--bench", str(tmp_path / "bench.json"), *rest]) == 1
        assert text in capsys.readouterr().err
    assert main(["capacity", "--bench", str(tmp_path / "none.json"), *rest]) == 1
    file = str(benched(tmp_path / "bench.json", costs()))
    for wrong in (["--arrivals", "never"], ["--prompt", "many"], ["--rate", "nan"]):
        assert main(["capacity", "--bench", file, *rest, *wrong]) == 2


@pytest.mark.slow
def test_bench_measures_what_capacity_reads(tmp_path, capsys):
    bundle = tmp_path / "tiny.bundle"
    import flamingo_export
    from flamingo_export.sources.choice import source_for_size

    flamingo_export.build(source_for_size("nano", seed=3), out=bundle, parity="skip")
    capsys.readouterr()
    line = [
        "bench",
        str(bundle),
        "--repeat",
        "2",
        "--images",
        "1",
        "--prompt-tokens",
        "60",
        "--new-tokens",
        "4",
        "--threads",
        "1",
    ]
    assert main([*line, "--grid", "--json"]) == 0
    (tmp_path / "bench.json").write_text(capsys.readouterr().out)
    head, found = read_bench(tmp_path / "bench.json")
    assert (head.model, found.rows, found.widths, found.frames) == ("nano", (1, 2, 4, 8, 16), (1, 3), (1, 4, 8))
    assert found.decoding(16, 3, found.slots[-1]) > found.decoding(1, 1, found.slots[-1])
    assert found.prefilling(256, found.slots[-1]) > found.prefilling(8, found.slots[-1])
    assert main(["capacity", "--bench", str(tmp_path / "bench.json"), "--rate", "1", "--p95", "5", "--requests", "100"]) == 0
