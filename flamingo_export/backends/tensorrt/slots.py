"""Which slots of the caches a call writes and sees: what an engine would do wrong in silence is refused before it is asked.

"Out-of-bound updates will be ignored silently" (TensorRT's header of cache updates), and attentions that know the slots in use do not look
behind them, whatever the mask says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flamingo_export.errors import InputError


def check_writes(name: str, feeds: Mapping[str, Any], capacity: int) -> None:
    """Raises InputError if a row would write past the capacity. What lies on the device already is not looked at."""
    index, positions = feeds.get("write_index"), feeds.get("positions")
    if not isinstance(index, np.ndarray) or positions is None or not index.size:
        return
    last = int(index.max()) + int(positions.shape[1])
    if last > capacity or int(index.min()) < 0:
        row = int(index.argmax() if last > capacity else index.argmin())
        raise InputError(
            f"{name}: row {row} would write {positions.shape[1]} slots from {int(index[row])} on, its cache has {capacity}. "
            "Nothing was written."
        )


def check_mask(name: str, feeds: Mapping[str, Any]) -> None:
    """Raises InputError if a position may see a slot from `write_index + S` on: nothing was written there. It reads the whole mask, so it is for
    tests."""
    index, positions, mask = (feeds.get(each) for each in ("write_index", "positions", "mask"))
    if not all(isinstance(value, np.ndarray) for value in (index, positions, mask)):
        return
    assert index is not None
    assert positions is not None
    assert mask is not None
    beyond = np.arange(mask.shape[-1]) >= (index + positions.shape[1])[:, None, None, None]
    if bool((mask & beyond).any()):
        row = int(np.argwhere(mask & beyond)[0][0])
        raise InputError(f"{name}: row {row} may see slots behind the {int(index[row]) + positions.shape[1]} that are in use")
