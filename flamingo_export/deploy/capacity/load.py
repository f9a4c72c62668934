"""What is asked of a fleet: how often, how large, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import InputError

Pattern = Literal["poisson", "bursts", "day"]
PATTERNS: tuple[str, ...] = get_args(Pattern)
BURST = 8.0
"""Requests of a burst on average; their number is geometric."""
_NIGHT = 0.2
"""Of the day's mean, the rate at its lowest; the highest is as far above the mean."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests as the engine sees them.

    prompt, new_tokens: least and most of a request, each in between equally likely; the prompt counts its `<image>` tags.
    images: of a request, all different from those of other requests but for the shared ones.
    shared_prompt, shared_images: how much of the beginning is the same for all, as few-shot examples are.
    beams: branches of a request. callers: how many there are, who are served in turn.
    """

    prompt: tuple[int, int] = (256, 256)
    new_tokens: tuple[int, int] = (32, 32)
    images: int = 1
    shared_prompt: int = 0
    shared_images: int = 0
    beams: int = 1
    callers: int = 1

    def check(self, max_length: int, bank_rows: int) -> None:
        """Raises InputError for a load that no engine of these limits could carry, or that contradicts itself."""
        for name, (low, high) in (("prompt", self.prompt), ("new tokens", self.new_tokens)):
            if not 1 <= low <= high:
                raise InputError(
                    f"{low} to {high} {name} is not a range. Give one number, or the least and the most as 128:512."
                )
        if not 0 <= self.shared_images <= self.images:
            raise InputError(
                f"{self.shared_images} of {self.images} images cannot be shared. Give --shared-images at most --images."
            )
        if not self.shared_images <= self.shared_prompt < self.prompt[0]:
            raise InputError(
                f"a shared beginning of {self.shared_prompt} tokens with {self.shared_images} images does not fit a prompt of "
                f"{self.prompt[0]}. It holds a tag for each shared image, and ends before the prompt does."
            )
        if self.images - self.shared_images > self.prompt[0] - self.shared_prompt - 1:
            raise InputError(f"a prompt of {self.prompt[0]} tokens has no room for {self.images} images and a word.")
        needed = self.prompt[1] + self.beams * self.new_tokens[1]
        if needed > max_length:
            raise InputError(
                f"{self.prompt[1]} prompt tokens with {self.beams} beams of {self.new_tokens[1]} new ones need {needed} cache slots, "
                f"the benchmarked bundle allows {max_length}. Ask for less, or benchmark a bundle with a larger --max-length."
            )
        if self.images > bank_rows:
            raise InputError(
                f"a request of {self.images} images was asked for, the benchmarked bundle's bank holds {bank_rows}."
            )


def arrivals(pattern: str, rate: float, count: int, seed: int) -> npt.NDArray[np.float64]:
    """Seconds at which `count` requests arrive, float64 [count], growing. rate: of requests per second, on average.

    poisson: independent of each other. bursts: groups of BURST on average arrive at once. day: poisson with a rate that goes through a day
    from night to noon and back in the time that the requests take.
    """
    rng = np.random.default_rng(seed)
    if pattern == "poisson":
        return np.cumsum(rng.exponential(1 / rate, count))
    if pattern == "bursts":
        sizes = rng.geometric(1 / BURST, count)
        starts = np.cumsum(rng.exponential(BURST / rate, count))
        times: npt.NDArray[np.float64] = np.repeat(starts, sizes)[:count]
        return times
    if pattern == "day":
        # Equally spread in the integral of the rate: the inverse of the cumulated curve takes unit-rate arrivals to the day's.
        span = count / rate
        grid = np.linspace(0, span, 4096)
        done = np.concatenate([[0], np.cumsum(np.diff(grid) * rate * day_curve((grid[1:] + grid[:-1]) / 2 / span))])
        unit = np.cumsum(rng.exponential(1, count))
        inverse: npt.NDArray[np.float64] = np.interp(unit * done[-1] / max(unit[-1], done[-1]), done, grid)
        return inverse
    raise InputError(f"{pattern!r} is not a pattern of arrivals. Choose one of {', '.join(PATTERNS)}.")


def day_curve(place: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rate at a place of the day, 0 and 1 being night, as a multiple of the mean."""
    curve: npt.NDArray[np.float64] = 1 - (1 - _NIGHT) * np.cos(2 * math.pi * place)
    return curve


def peak_of(pattern: str) -> float:
    """The highest rate that lasts, as a multiple of the mean: what replicas are counted for."""
    return 2 - _NIGHT if pattern == "day" else 1.0
