"""inspect: counts against independent sums, both ways of printing."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from flamingo_export.cli.parameter_table import components
from flamingo_reference.config import NANO, QUOTED_PARAMETERS, SIZES


def by_name(parts):
    return {part.name: part for part in parts}


def test_parameters_of_9b_against_the_paper(cli):
    outcome = cli("inspect", "--size", "9b")
    assert outcome.code == 0
    rows = {line.split()[0]: line for line in outcome.out.splitlines() if "%" in line}
    # Paper, section 3.1: 435M vision encoder; the resampler's table of shapes gives 174.7M, not the 194M that it quotes.
    assert "435,286,116" in rows["vision_encoder"]
    assert "435M" in rows["vision_encoder"]
    assert "-9.9 %" in rows["resampler"]
    assert "7.10B" in rows["language_model"]
    assert "9.30B" in rows["total"]


LLAMA_3_1 = {"llama-3.2-11b-vision": 8_030_261_248 + 8 * 4096, "llama-3.2-90b-vision": 70_553_706_496 + 8 * 8192}
"""Their language models are Llama 3.1's 8B and 70B, whose parameters Meta counts, and eight more rows of embeddings."""


@pytest.mark.parametrize("size", SIZES)
def test_json_has_the_same_counts(cli, size):
    outcome = cli("inspect", "--size", size, "--json")
    data = json.loads(outcome.out)
    assert data["size"] == size
    parts = {part["name"]: part for part in data["parameters"]}
    assert parts["total"]["parameters"] == sum(part["parameters"] for name, part in parts.items() if name != "total")
    lm = SIZES[size].language_model
    inner = lm.num_heads * lm.head_size
    layer = 5 * lm.width * inner + 2 * inner + 2 * lm.width + 2 * lm.width * lm.ffw_width
    expected = LLAMA_3_1.get(size, lm.vocab_size * lm.width + lm.num_layers * layer + lm.width)
    assert parts["language_model"]["parameters"] == expected
    assert parts["total"]["quoted"] == QUOTED_PARAMETERS.get(size, {}).get("total")


def test_a_changed_preset_is_not_compared_with_the_paper():
    nine = SIZES["9b"]
    changed = msgspec.structs.replace(nine, language_model=msgspec.structs.replace(nine.language_model, num_layers=32))
    assert by_name(components(changed))["total"].quoted is None
    assert by_name(components(nine))["total"].quoted == 9.3e9


def test_counts_of_nano_are_the_checkpoints_tensors():
    from flamingo_reference.names import expected_tensors

    total = sum(int(np.prod(shape, dtype=np.int64)) for shape in expected_tensors(NANO).values())
    assert by_name(components(NANO))["total"].parameters == total
