"""Bookkeeping of cached slots: which slots each row has used, and which of them each branch sees.

Batch row = request. The prompt occupies slots 0 .. P - 1, slot = position. Each decoding step then writes one slot a branch, whatever its
position; a branch's mask row names its ancestors among them, so reordering beams is `mask = mask[parent]` and no K/V moves.

    slots      0 1 2 3 4 | 5 6 7 | 8 9 10         prompt of 5, 3 beams, 2 steps
    position   0 1 2 3 4 | 5 5 5 | 6 6 6
    branch 0   x x x x x | . x . | x . .          its token at slot 8 has the parent in slot 6
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class BeamTree:
    """Mask [B, 1, W, C], key positions [B, C] and write index [B] of the next decoding step, kept up to date in place."""

    def __init__(self, prompt_lengths: Sequence[int], width: int, capacity: int) -> None:
        batch = len(prompt_lengths)
        self.width = width
        self.prompt_lengths = np.asarray(prompt_lengths, np.int64)
        self.used = self.prompt_lengths.copy()
        """Slots that hold something to be kept, [B]; the next step writes from there on."""
        self.steps = np.zeros(batch, np.int64)
        """Steps taken, [B]."""
        self.mask: Mask = np.zeros((batch, 1, width, capacity), np.bool_)
        self.key_positions: Ints = np.tile(np.arange(capacity, dtype=np.int64), (batch, 1))
        self._branch = np.arange(width)
        for row, length in enumerate(prompt_lengths):
            self.mask[row, 0, :, :length] = True

    @property
    def capacity(self) -> int:
        return int(self.mask.shape[3])

    def slots_needed(self, batch: int) -> int:
        """Capacity that the next step of the first `batch` rows needs."""
        return int(self.used[:batch].max()) + self.width

    def grow(self, capacity: int) -> None:
        """Widens mask and key positions to a larger cache; what they say of the old slots stays."""
        batch, old = self.key_positions.shape
        mask = np.zeros((batch, 1, self.width, capacity), np.bool_)
        mask[..., :old] = self.mask
        key_positions = np.tile(np.arange(capacity, dtype=np.int64), (batch, 1))
        key_positions[:, :old] = self.key_positions
        self.mask, self.key_positions = mask, key_positions

    def step(self, row: int, parents: Ints) -> None:
        """The next step's tokens of `row`: branch w continues branch parents[w] and gets a slot of its own."""
        used = int(self.used[row])
        rows = self.mask[row, 0]
        rows[:] = rows[parents]
        # A retired row's scratch may have marked these slots, a step before only the branches' own.
        rows[:, used : used + self.width] = False
        rows[self._branch, used + self._branch] = True
        self.key_positions[row, used : used + self.width] = self.prompt_lengths[row] + self.steps[row]

    def commit(self, row: int) -> None:
        """After the step was run: its slots are kept."""
        self.used[row] += self.width
        self.steps[row] += 1

    def retire(self, row: int) -> None:
        """A finished row that stays in the batch as padding: each branch sees only the scratch slot it writes."""
        used = int(self.used[row])
        self.mask[row] = False
        self.mask[row, 0, self._branch, used + self._branch] = True

    def positions(self, batch: int) -> Ints:
        """Position of the next step's tokens, [B]."""
        return self.prompt_lengths[:batch] + self.steps[:batch]
