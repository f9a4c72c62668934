"""Bookkeeping of slots and masks, against branches that remember their whole ancestry."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.runtime.tree import BeamTree

STEPS = st.lists(st.lists(st.integers(0, 7), min_size=4, max_size=4), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 4),
    draws=STEPS,
    growth=st.integers(0, 5),
    retired=st.integers(0, 12),
)
def test_each_branch_sees_its_prompt_and_ancestors_only(
    lengths: list[int], width: int, draws: list[list[int]], growth: int, retired: int
) -> None:
    batch = len(lengths)
    tree = BeamTree(lengths, width, capacity=max(lengths) + width)
    # The plain way: each branch is the list of (slot, position) that it sees.
    branches = [[[(slot, slot) for slot in range(length)] for _ in range(width)] for length in lengths]
    active = list(range(batch))
    for number, draw in enumerate(draws):
        if number == retired and len(active) > 1:
            active = active[1:]
        if tree.slots_needed(batch) > tree.capacity:
            tree.grow(tree.slots_needed(batch) + growth)
        write_index = tree.used.copy()
        for row in range(batch):
            if row not in active:
                tree.retire(row)
                continue
            parents = np.array([value % width for value in draw[:width]])
            tree.step(row, parents)
            position = lengths[row] + int(tree.steps[row])
            assert tree.positions(batch)[row] == position
            branches[row] = [
                [*branches[row][parent], (int(write_index[row]) + branch, position)] for branch, parent in enumerate(parents)
            ]
        for row in range(batch):
            for branch in range(width):
                seen = np.flatnonzero(tree.mask[row, 0, branch]).tolist()
                if row in active:
                    assert [(slot, int(tree.key_positions[row, slot])) for slot in seen] == branches[row][branch]
                else:
                    assert seen == [int(write_index[row]) + branch]
        assert (tree.used + width <= tree.capacity).all()
        assert (tree.positions(batch) < tree.capacity).all()  # the graph reads distances below the capacity only
        for row in active:
            tree.commit(row)
            assert tree.used[row] == write_index[row] + width
