"""The types of NumPy arrays by what their elements are. Shapes stand in docstrings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

Shape = tuple[int, ...]
