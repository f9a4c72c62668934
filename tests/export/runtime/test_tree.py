"""Bookkeeping of slots and masks, against branches that remember their whole ancestry."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.runtime.tree import BeamTree

STEPS = st.lists(st.lists(st.integers(0, 7), min_size=4, max_size=4), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(length=st.integers(1, 9), hidden=st.sets(st.integers(0, 8)), width=st.integers(1, 4), draws=STEPS, gap=st.integers(0, 3))
def test_each_branch_sees_its_prompt_and_ancestors_only(
    length: int, hidden: set[int], width: int, draws: list[list[int]], gap: int
) -> None:
    visible = np.zeros(9 + 8 * (3 + 4), np.bool_)  # the longest prompt, and eight steps of four branches after the widest gap
    visible[[slot for slot in range(length) if slot not in hidden]] = True
    tree = BeamTree(visible, length, width)
    # The plain way: each branch is the list of slots that it sees.
    branches = [[int(slot) for slot in np.flatnonzero(visible)] for _ in range(width)]
    used = length
    for number, draw in enumerate(draws):
        used += gap  # others may have written between
        parents = np.array([value % width for value in draw[:width]])
        tree.step(parents, used)
        assert tree.position == length + number
        branches = [[*branches[parent], used + branch] for branch, parent in enumerate(parents)]
        assert [np.flatnonzero(row).tolist() for row in tree.mask] == branches
        used += width
        tree.commit()
