"""The check's cases of ranges of media: run on the emulated kernels, and against wrong results that they must notice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu import kernel_build, range_cases
from gpu.kernel_cases import HEAD_SIZES, TYPES
from gpu.range_cases import LAYOUTS, Case, RangeKernels


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> RangeKernels:
    """The kernels of head size 32, block by block on the CPU."""
    if kernel_build.find_compiler() is None:
        pytest.skip("no C++ compiler (g++)")
    return RangeKernels(kernel_build.build_emulated_library(tmp_path_factory.mktemp("emulated")))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_the_emulated_kernels(emulated, layout):
    """As the check runs them on a card, with each type; keys that are split where queries are few."""
    keys = 700 if layout in ("step", "17 queries") else 100
    cases = [Case(layout, dtype, kv_dtype, 32, keys) for dtype, kv_dtype in TYPES]
    found = range_cases.check(emulated, iter(cases), 1, device="cpu")
    assert found["cases"] == len(TYPES)
    assert not found["failures"]
    decodes = layout in ("step", "beams")
    assert set(found["worst_share_of_allowance"]) == {"range_fp32", "range_decode" if decodes else "range"}


@pytest.mark.slow
def test_refusals_and_shapes(emulated):
    assert range_cases.check_refusals(emulated, device="cpu") == {"cases": 8, "failures": []}
    assert range_cases.check_shapes(emulated, 0) == {"cases": len(TYPES) * (len(HEAD_SIZES) + 1), "failures": []}


def test_wrong_results_are_noticed():
    """A range that begins or ends one medium off, keys of the other head, and a position without a medium that is not zero."""
    case = Case("ragged", torch.bfloat16, torch.bfloat16, 64, 64)
    inputs = range_cases.make(case, torch.Generator().manual_seed(5), device="cpu")
    right = range_cases.attend(inputs, torch.float64).to(torch.bfloat16)
    assert max(range_cases.compare(inputs, right).values()) < 1
    seen = [(b, s) for b, request in enumerate(range_cases.rows_seen(inputs)) for s, rows in enumerate(request) if rows]
    empty = [(b, s) for b, request in enumerate(range_cases.rows_seen(inputs)) for s, rows in enumerate(request) if not rows]
    assert seen
    assert empty
    for field, step in (("first_media", 1), ("phi", -1)):
        moved = range_cases.Inputs(**{**vars(inputs), field: getattr(inputs, field) + step})
        with pytest.raises(AssertionError, match=r"error|zero"):
            range_cases.compare(inputs, range_cases.attend(moved, torch.float64).nan_to_num().to(torch.bfloat16))
    swapped = range_cases.Inputs(**{**vars(inputs), "k": inputs.k.flip(1)})
    with pytest.raises(AssertionError, match="error"):
        range_cases.compare(inputs, range_cases.attend(swapped, torch.float64).to(torch.bfloat16))
    for place, value, words in ((empty[0], 1e-6, "not exactly zero"), (seen[0], torch.nan, "not finite")):
        wrong = right.clone()
        wrong[place] = value
        with pytest.raises(AssertionError, match=words):
            range_cases.compare(inputs, wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_what_their_names_say(layout):
    inputs = range_cases.make(
        Case(layout, torch.float32, torch.float32, 32, 16), torch.Generator().manual_seed(3), device="cpu"
    )
    seen = [rows for request in range_cases.rows_seen(inputs) for rows in request]
    most = max(map(len, seen))
    assert most == {
        "images of tiles": 4,
        "one tile": 1,
        "ragged": 3,
        "no medium": 0,
        "empty bank": 0,
        "step": 4,
        "beams": 4,
    }.get(layout, most)
    assert (layout in ("no medium", "empty bank")) == (most == 0)
    if layout == "side by side":
        assert most == 6
    result = range_cases.attend(inputs, torch.float64)
    assert bool(result.isfinite().all())
    assert [bool((row == 0).all()) for request in result for row in request] == [not rows for rows in seen]


def test_the_sanitizer_runs_every_kernel_and_type():
    cases = list(range_cases.few_cases())
    assert {(case.dtype, case.kv_dtype) for case in cases} == set(TYPES)
    assert len(list(range_cases.all_cases())) == len(LAYOUTS) * len(TYPES) * len(HEAD_SIZES) * 4
