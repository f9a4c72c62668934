"""Tables of names: what a line says, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from flamingo_reference.checkpoints.name_table import Line, filled, table


def test_what_lines_say() -> None:
    lines = table("""
        q_proj     attn.to_q          I,W
        norm       attn.norm          W      bias
        k_proj     attn.to_kv         I,W    part 2 of 3
        latents    perceiver.latents  R,C    exact
    """)
    assert lines == (
        Line("q_proj.weight", "attn.to_q.weight", ("I", "W")),
        Line("norm.weight", "attn.norm.weight", ("W",)),
        Line("norm.bias", "attn.norm.bias", ("W",)),
        Line("k_proj.weight", "attn.to_kv.weight", ("I", "W"), 2, 3),
        Line("latents", "perceiver.latents", ("R", "C")),
    )
    found = filled(lines, "layers.0.", "blocks.0.", {"I": 4, "W": 2, "R": 5, "C": (3, 7, 7)})
    assert {name: dict(recipe.sources) for name, recipe in found.items()} == {
        "layers.0.q_proj.weight": {"blocks.0.attn.to_q.weight": (4, 2)},
        "layers.0.norm.weight": {"blocks.0.attn.norm.weight": (2,)},
        "layers.0.norm.bias": {"blocks.0.attn.norm.bias": (2,)},
        "layers.0.k_proj.weight": {"blocks.0.attn.to_kv.weight": (12, 2)},
        "layers.0.latents": {"blocks.0.perceiver.latents": (5, 3, 7, 7)},
    }
    joined = np.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(found["layers.0.k_proj.weight"].make([joined]), joined[4:8])


@pytest.mark.parametrize("line", ["q_proj to_q", "q_proj to_q I,W twice", "q_proj to_q I,W part 1", "q_proj"])
def test_what_is_no_line(line: str) -> None:
    with pytest.raises(ValueError, match="no line of a table of names"):
        table(line)
