"""A card in host memory: the fake CUDA device, on which PyTorch computes with the CPU when the stream comes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fake_cuda import FakeCuda


class FakeCard:
    """Implements gpu.torch_backend.Card."""

    def __init__(self) -> None:
        self.cuda: Any = FakeCuda()
        self.cuda.dlpack_device = (1, 0)  # PyTorch may look into it
        self.device = torch.device("cpu")

    def enqueue(self, stream: int, work: Callable[[], None], pool: Any) -> None:
        self.cuda.ask(stream, work)

    def pool(self) -> None:
        return None

    def foreign(self, array: np.ndarray) -> _OnDevice:
        return _OnDevice(torch.from_numpy(array))


class _OnDevice:
    """A tensor of the CPU that takes a stream as those of a device do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, *, stream: int | None = None) -> object:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0
