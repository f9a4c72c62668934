"""How text is chosen: beam search by default, greedy, or sampling."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import InputError
from flamingo_export.runtime.cache import check_capacity, check_positions, slots_for
from flamingo_export.runtime.search import BeamSearch, Sampling, Search, StopRule
from flamingo_reference.config import ModelConfig

DEFAULT_BEAMS = 3
DEFAULT_NEW_TOKENS = 64
MAX_LENGTH_PENALTY = 10.0
"""On either side: beyond it the powers of lengths leave the range of floating point numbers."""


class Settings(TypedDict, total=False):
    """The fields of GenerateOptions, as keyword arguments of `generate` and `stream`."""

    beams: int | None
    max_new_tokens: int | None
    length_penalty: float
    num_return: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Settings of a generation.

    beams: 3 unless sampling; 1 is greedy. temperature, top_k and top_p (any of them) sample instead, from `seed` where given; num_return
    is then the number of samples, otherwise the number of best beams returned. max_new_tokens: 64, or fewer where the cache is smaller.
    length_penalty: hypotheses are ordered by sum(log p) / length ** length_penalty.
    """

    beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float = 0.0
    num_return: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return not (self.temperature is None and self.top_k is None and self.top_p is None) and self.temperature != 0.0

    @property
    def width(self) -> int:
        """Branches of a request, W."""
        if self.samples:
            return self.num_return
        return DEFAULT_BEAMS if self.beams is None else self.beams

    def check(self, config: ModelConfig) -> None:
        """Raises InputError naming each setting that cannot be."""
        self.check_values()
        if not self.samples and 2 * self.width > config.language_model.vocab_size:
            raise InputError(
                f"{self.width} beams need a vocabulary of at least {2 * self.width}, it has {config.language_model.vocab_size}"
            )

    def check_values(self) -> None:
        """Raises InputError naming each setting that cannot be, whatever the model."""
        faults = self._types()
        if faults:
            raise InputError("; ".join(faults))
        for name, value, least in (
            ("beams", self.beams, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("num_return", self.num_return, 1),
            ("top_k", self.top_k, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                faults.append(f"{name} is {value}, expected at least {least}")
        if self.temperature is not None and not 0.0 <= self.temperature < float("inf"):
            faults.append(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            faults.append(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not -MAX_LENGTH_PENALTY <= self.length_penalty <= MAX_LENGTH_PENALTY:
            faults.append(f"length_penalty is {self.length_penalty}, expected {-MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}")
        if self.samples and self.beams is not None and self.beams > 1:
            faults.append(f"{self.beams} beams and sampling were both asked for; choose one")
        if not faults and not self.samples and self.num_return > self.width:
            faults.append(f"num_return is {self.num_return}, but there are {self.width} beams; use at least as many beams")
        if faults:
            raise InputError("; ".join(faults))

    def _types(self) -> list[str]:
        faults = []
        for name in ("beams", "max_new_tokens", "num_return", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                faults.append(f"{name} is {value!r}, expected a whole number")
        for name in ("temperature", "top_p", "length_penalty"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (value is None and name != "length_penalty"):
                faults.append(f"{name} is {value!r}, expected a number")
        return faults

    def new_tokens(self, prompt: int, limits: ShapeLimits, position_limit: int | None = None) -> int:
        """Tokens to generate at most after a prompt of this length.

        Raises CapacityError if they, or a single one, do not fit the cache or the model's positions.
        """
        least = 1 if self.max_new_tokens is None else self.max_new_tokens
        check_positions(prompt=prompt, new_tokens=least, position_limit=position_limit)
        check_capacity(prompt=prompt, width=self.width, new_tokens=least, limits=limits)
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        fits = DEFAULT_NEW_TOKENS if position_limit is None else min(DEFAULT_NEW_TOKENS, position_limit - prompt)
        while slots_for(prompt=prompt, width=self.width, new_tokens=fits) > limits.max_length:
            fits -= 1
        return fits

    def search(self, config: ModelConfig, max_new_tokens: int) -> Search:
        """A fresh search for one request."""
        rule = StopRule(eoc=config.tokens.eoc, banned=config.tokens.image, max_new_tokens=max_new_tokens)
        if self.samples:
            temperature = 1.0 if self.temperature is None else self.temperature
            return Sampling(
                rule, branches=self.num_return, temperature=temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
            )
        if self.width == 1:
            return Sampling(rule)
        return BeamSearch(rule, beams=self.width, length_penalty=self.length_penalty)
