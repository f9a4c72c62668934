"""The branches of one request: which slots of its cache row each of them sees.

The prompt occupies slots 0 .. P - 1, slot = position. Each decoding step then writes one slot a branch, whatever its position; a branch's
mask names its ancestors among them, so reordering beams is `mask = mask[parents]` and no key or value moves.

    slots      0 1 2 3 4 | 5 6 7 | 8 9 10         prompt of 5, 3 beams, 2 steps
    position   0 1 2 3 4 | 5 5 5 | 6 6 6
    branch 0   x x x x x | . x . | x . .          its token at slot 8 has the parent in slot 6
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flamingo_reference.arrays import Ints

Mask = npt.NDArray[np.bool_]


class BeamTree:
    """Mask [W, C] of the next decoding step, C being the largest capacity, and the position of its tokens."""

    def __init__(self, visible: Mask, position: int, width: int) -> None:
        """A tree of W = width branches after a prompt.

        visible: slots of the prompt, which all branches see, bool [C].
        position: of the first new token.
        """
        self.width = width
        self.position = position
        self.mask: Mask = np.repeat(visible[None], width, axis=0)
        self._branch = np.arange(width)

    def step(self, parents: Ints, first: int) -> None:
        """The next step's tokens: branch w continues branch parents[w] and gets slot first + w, which nobody has used."""
        self.mask[:] = self.mask[parents]
        self.mask[self._branch, first + self._branch] = True

    def commit(self) -> None:
        """After the step was run: the next one is a position further."""
        self.position += 1

    def take_back(self, first: int) -> None:
        """The last step, whose slots begin at `first`, was run in vain."""
        self.position -= 1
        self.mask[:, first : first + self.width] = False
