"""Tokens that pass from one step to the next on the device: the likeliest candidate is copied from where the step before left it, a drawn one
is chosen by a kernel, and read back before the step is done, so that the host can tell whether it would have drawn the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flamingo_export.backends.base import Handed
from flamingo_export.backends.tensorrt.device_memory import DeviceStream, Memory
from flamingo_export.backends.tensorrt.result_buffers import TOKENS, Slot
from flamingo_export.backends.tensorrt.sending import NO_CHOICES, NO_UPDATES, Updates, updates_of
from flamingo_export.backends.tensorrt.step_kernels import CHOICE, FROM_MEMORY

_TOKEN = 8


@dataclass(frozen=True, kw_only=True)
class Hand:
    """What a run leaves to the next one. ids, values: its candidates, n for each branch. slot: where drawn tokens are read to."""

    handed: Handed
    ids: Memory
    values: Memory
    n: int
    slot: Slot

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return self.handed.draws is not None

    def at(self, tokens: int) -> tuple[Updates, Updates]:
        """Updates and choices that put the tokens into an input that lies at this address."""
        source = self.handed.source.reshape(-1)
        places = np.flatnonzero(source >= 0)
        branches = source[places]
        targets = places.astype(np.uint64) * np.uint64(_TOKEN) + np.uint64(tokens)
        draws = self.handed.draws
        if draws is None:
            there = branches.astype(np.uint64) * np.uint64(_TOKEN * self.n) + np.uint64(self.ids.address)
            return updates_of(targets | FROM_MEMORY, there), NO_CHOICES
        choices: Updates = np.empty(len(places), CHOICE)
        choices["target"], choices["branch"] = targets, branches
        for name in ("temperature", "top_k", "top_p", "min_p", "uniform"):
            choices[name] = getattr(draws, name).reshape(-1)[places]
        return NO_UPDATES, choices

    def fetch(self, stream: DeviceStream, tokens: int, count: int) -> None:
        """Asks for the tokens, `count` of them, that lie at this address once they are chosen."""
        size = count * _TOKEN
        stream.cuda.copy(self.slot.block(TOKENS, size).address, tokens, size, "to host", stream.handle)
        stream.cuda.record(self.slot.chosen, stream.handle)
