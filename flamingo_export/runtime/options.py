"""How text is chosen: beam search by default, greedy, or sampling."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TypedDict

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import InputError
from flamingo_export.runtime.beam_search import BeamSearch
from flamingo_export.runtime.cache import check_capacity, check_positions, slots_for
from flamingo_export.runtime.constraints import Form, Forms, JsonSchema
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import Search, StopRule
from flamingo_export.runtime.steering import Decode, Steering, StopTexts
from flamingo_reference.config import ModelConfig

DEFAULT_BEAMS = 3
DEFAULT_NEW_TOKENS = 64
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_BIAS = 1e6
MAX_CHOICES = 1024
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
    min_p: float | None
    stop: str | Sequence[str]
    logit_bias: Mapping[int, float]
    repetition_penalty: float
    no_repeat_ngram: int
    min_new_tokens: int
    early_stopping: bool
    top_logprobs: int
    json_schema: JsonSchema | None
    regex: str | None
    choice: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Settings of a generation.

    beams: 3 (or num_return, where that is more) unless sampling; 1 is greedy, and so is temperature 0.
    temperature, top_k, top_p, min_p: any of them samples instead of searching, from `seed` where it is given. min_p leaves out what is less
        likely than so much of the likeliest.
    num_return: texts wanted, the best beams or as many samples.
    max_new_tokens: 64, or fewer where the cache is smaller.
    length_penalty: beams are ordered by sum(log p) / length ** length_penalty.
    early_stopping: beams end as soon as there are enough finished texts, whatever the others may become.
    stop: texts that end the answer, which is cut before them.
    logit_bias: token id -> what is added to its logit.
    repetition_penalty: of tokens that were in the prompt or the answer; above 1 makes them less likely.
    no_repeat_ngram: no sequence of so many tokens comes twice; 0 allows it.
    min_new_tokens: tokens before the answer may end.
    top_logprobs: likeliest tokens to be reported at each place.
    json_schema, regex, choice: the answer is JSON of this schema, matches this expression as a whole, or is one of these texts (extra
        `constraints`), unless max_new_tokens cuts it.

    A setting that would have no effect beside the others is refused: `seed` where nothing is drawn, `top_k` at temperature 0,
    `length_penalty` where there are no beams to order.
    """

    beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float = 0.0
    num_return: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    stop: str | Sequence[str] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    early_stopping: bool = False
    top_logprobs: int = 0
    json_schema: JsonSchema | None = None
    regex: str | None = None
    choice: Sequence[str] = ()

    @property
    def form(self) -> Form | None:
        """What the answer must look like, if anything."""
        if self.json_schema is None and self.regex is None and not self.choice:
            return None
        return Form(json_schema=self.json_schema, regex=self.regex, choice=tuple(self.choice))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature != 0.0 and any(
            value is not None for value in (self.temperature, self.top_k, self.top_p, self.min_p)
        )

    @property
    def width(self) -> int:
        """Branches of a request, W."""
        if self.samples:
            return self.num_return
        if self.temperature is not None:  # 0: greedy
            return 1
        return max(DEFAULT_BEAMS, self.num_return) if self.beams is None else self.beams

    def check(self, config: ModelConfig) -> None:
        """Raises InputError naming each invalid setting."""
        self.check_values()
        unknown = [token for token in self.logit_bias if not 0 <= token < config.language_model.vocab_size]
        if unknown:
            raise InputError(
                f"logit_bias names token {unknown[0]}, the model knows 0 to {config.language_model.vocab_size - 1}"
            )
        needed = (1 + len(config.tokens.stops)) * self.width
        if not self.samples and needed > config.language_model.vocab_size:
            raise InputError(
                f"{self.width} beams need a vocabulary of at least {needed}, it has {config.language_model.vocab_size}"
            )

    def check_values(self, spelling: Callable[[str], str] = str) -> None:
        """Raises InputError naming each setting that cannot be or has no effect, whatever the model. spelling: of a setting's name."""
        faults = self._types()
        if not faults:
            faults = [spelled(fault, spelling) for fault in self._values() or self._together()]
        if faults:
            raise InputError("; ".join(faults))

    def _values(self) -> list[str]:
        """Settings out of their range."""
        faults = []
        for name, value, least in (
            ("beams", self.beams, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("num_return", self.num_return, 1),
            ("top_k", self.top_k, 1),
            ("seed", self.seed, 0),
            ("no_repeat_ngram", self.no_repeat_ngram, 0),
            ("min_new_tokens", self.min_new_tokens, 0),
            ("top_logprobs", self.top_logprobs, 0),
        ):
            if value is not None and value < least:
                faults.append(f"{{{name}}} is {value}, expected at least {least}")
        if self.temperature is not None and not 0.0 <= self.temperature < float("inf"):
            faults.append(f"{{temperature}} is {self.temperature}, expected 0 or more")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            faults.append(f"{{top_p}} is {self.top_p}, expected more than 0 and at most 1")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            faults.append(f"{{min_p}} is {self.min_p}, expected 0 to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            faults.append(f"{{repetition_penalty}} is {self.repetition_penalty}, expected more than 0")
        if self.top_logprobs > MAX_TOP_LOGPROBS:
            faults.append(f"{{top_logprobs}} is {self.top_logprobs}, expected at most {MAX_TOP_LOGPROBS}")
        if any(not -MAX_BIAS <= bias <= MAX_BIAS for bias in self.logit_bias.values()):
            faults.append(f"{{logit_bias}} has a bias outside -{MAX_BIAS:.0f} to {MAX_BIAS:.0f}")
        if not all(self.stops) or len(self.stops) > MAX_STOPS:
            given = repr(self.stop).replace("{", "{{").replace("}", "}}")  # braces in it name no setting
            faults.append(f"{{stop}} is {given}, expected at most {MAX_STOPS} texts, none of them empty")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            faults.append(f"{{min_new_tokens}} is {self.min_new_tokens}, {{max_new_tokens}} only {self.max_new_tokens}")
        if not all(text.strip() for text in self.choice) or len(self.choice) > MAX_CHOICES:
            faults.append(f"{{choice}} has {len(self.choice)} texts, expected at most {MAX_CHOICES}, none of them blank")
        if not -MAX_LENGTH_PENALTY <= self.length_penalty <= MAX_LENGTH_PENALTY:
            faults.append(
                f"{{length_penalty}} is {self.length_penalty}, expected {-MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}"
            )
        return faults

    def _together(self) -> list[str]:
        """Settings that exclude each other, and those that would be dropped without a word."""
        faults = []
        if self.samples:
            if self.beams is not None and self.beams > 1:
                faults.append(f"{self.beams} beams and sampling were both asked for; choose one")
        elif self.temperature is not None:
            if self.beams is not None and self.beams > 1:
                faults.append(f"{{temperature}} 0 is greedy, and {{beams}} is {self.beams}; choose one")
            if self.num_return > 1:
                faults.append(
                    f"{{num_return}} is {self.num_return}, and {{temperature}} 0 is greedy, which finds one text; use {{beams}}"
                )
            for name, value in (
                ("top_k", self.top_k),
                ("top_p", None if self.top_p == 1.0 else self.top_p),
                ("min_p", self.min_p or None),
            ):
                if value is not None:
                    faults.append(f"{{{name}}} is {value}, and {{temperature}} 0 takes the likeliest token; leave one out")
        elif self.num_return > self.width:
            faults.append(f"{{num_return}} {self.num_return} needs at least {self.num_return} beams, {{beams}} is {self.width}")
        if self.seed is not None and not self.samples:
            faults.append(
                f"{{seed}} is {self.seed}, but nothing is drawn: add {{temperature}}, {{top_k}} or {{top_p}}, or leave it out"
            )
        if (self.json_schema is not None) + (self.regex is not None) + bool(self.choice) > 1:
            faults.append("only one of {json_schema}, {regex} and {choice} can be asked for")
        if self.early_stopping and (self.samples or self.width == 1):
            faults.append("{early_stopping} was asked for, but there are no beams to stop; leave it out")
        if self.length_penalty != 0.0 and (self.samples or self.width == 1):
            faults.append(f"{{length_penalty}} is {self.length_penalty}, but there are no beams to order; leave it out")
        return faults

    def _types(self) -> list[str]:
        faults = []
        for name in (
            "beams", "max_new_tokens", "num_return", "top_k", "seed", "no_repeat_ngram", "min_new_tokens", "top_logprobs"
        ):  # fmt: skip
            value = getattr(self, name)
            left_out = value is None and name != "num_return"
            if not left_out and (isinstance(value, bool) or not isinstance(value, Integral)):
                faults.append(f"{name} is {value!r}, expected a whole number")
        for name in ("temperature", "top_p", "min_p", "length_penalty", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (value is None and name not in ("length_penalty", "repetition_penalty")):
                faults.append(f"{name} is {value!r}, expected a number")
        if not isinstance(self.stop, str | Sequence) or not all(isinstance(text, str) for text in self.stop):
            faults.append(f"stop is {self.stop!r}, expected a text or a list of texts")
        if not isinstance(self.early_stopping, bool):
            faults.append(f"early_stopping is {self.early_stopping!r}, expected True or False")
        if not isinstance(self.json_schema, Mapping | bool | None):
            faults.append(f"json_schema is {type(self.json_schema).__name__}, expected an object: {{'type': 'object', ...}}")
        if not isinstance(self.regex, str | None):
            faults.append(f"regex is {self.regex!r}, expected a text")
        if (
            isinstance(self.choice, str)
            or not isinstance(self.choice, Sequence)
            or not all(isinstance(text, str) for text in self.choice)
        ):
            faults.append(f"choice is {self.choice!r}, expected a list of texts")
        if not isinstance(self.logit_bias, Mapping) or not all(
            isinstance(token, Integral) and isinstance(bias, Real) for token, bias in self.logit_bias.items()
        ):
            faults.append(f"logit_bias is {self.logit_bias!r}, expected numbers by token id")
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

    def check_seed(self, seed: int | None) -> None:
        """Raises InputError if a request's own seed is invalid, or has no effect."""
        if seed is not None:
            replace(self, seed=seed).check_values()

    def search(
        self,
        config: ModelConfig,
        max_new_tokens: int,
        seed: int | None = None,
        *,
        prompt: Sequence[int] = (),
        decode: Decode | None = None,
        forms: Forms | None = None,
    ) -> Search:
        """A fresh search for one request.

        seed: the request's own, in place of the one for all.
        prompt: its token ids, which penalties count.
        decode: new tokens to text, in which stop texts are looked for. Raises InputError if there are some and it is None.
        forms: compiles the form that an answer must have. Raises InputError if there is one and it is None, or cannot be compiled.
        """
        tokens = config.tokens
        if self.stops and decode is None:
            raise InputError(
                "the bundle has no tokenizer, so there is no text in which stop texts could be found. Leave out stop."
            )
        form = self.form
        if form is not None and forms is None:
            raise InputError(
                "the bundle has no tokenizer, so answers cannot be given a form. Leave out json_schema, regex and choice."
            )
        guide = forms.guide(form) if form is not None and forms is not None else None
        steering = Steering(
            prompt=tuple(prompt),
            ends=tokens.stops,
            logit_bias=self.logit_bias,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            min_new_tokens=self.min_new_tokens,
            guide=guide,
        )
        steers = (
            guide is not None
            or self.logit_bias
            or self.repetition_penalty != 1.0
            or self.no_repeat_ngram
            or self.min_new_tokens
        )
        rule = StopRule(
            eoc=tokens.eoc,
            ends=tokens.ends,
            banned=config.banned_logits,
            max_new_tokens=max_new_tokens,
            stop=StopTexts(self.stops, decode) if self.stops and decode is not None else None,
            steering=steering if steers else None,
            top=self.top_logprobs,
        )
        if self.samples:
            temperature = 1.0 if self.temperature is None else self.temperature
            return Sampling(
                rule,
                branches=self.num_return,
                temperature=temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                seed=self.seed if seed is None else seed,
            )
        if self.width == 1:
            return Sampling(rule)
        return BeamSearch(rule, beams=self.width, length_penalty=self.length_penalty, early_stopping=self.early_stopping)


def spelled(text: str, spelling: Callable[[str], str]) -> str:
    """The text with each setting in it, `{top_k}`, as `spelling` writes it."""
    return text.format_map({field.name: spelling(field.name) for field in fields(GenerateOptions)})


def options_from(settings: Settings, others: Collection[str] = ()) -> GenerateOptions:
    """The options that keyword arguments amount to, checked.

    others: keyword arguments that the caller takes besides, to name where one of them was mistyped.
    Raises InputError for names that there are not, with the nearest there is, and for invalid values.
    """
    known = [field.name for field in fields(GenerateOptions)]
    faults = [unknown_setting(name, (*known, *others)) for name in settings if name not in known]
    if faults:
        raise InputError("; ".join(faults) + f". Settings: {', '.join(known)}.")
    options = GenerateOptions(**settings)
    options.check_values()
    return options


def unknown_setting(name: str, known: Collection[str]) -> str:
    """Says that there is no setting of this name, and which comes nearest."""
    if name in OTHER_NAMES:
        return f"there is no setting {name}: {spelled(OTHER_NAMES[name], str)}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"there is no setting {name}" + (f"; did you mean {near[0]}?" if near else "")


OTHER_NAMES = {
    "num_beams": "it is called {beams} here",
    "beam_size": "it is called {beams} here",
    "beam_width": "it is called {beams} here",
    "max_tokens": "it is called {max_new_tokens} here",
    "max_completion_tokens": "it is called {max_new_tokens} here",
    "max_output_tokens": "it is called {max_new_tokens} here",
    "stop_sequences": "it is called {stop} here",
    "stop_strings": "it is called {stop} here",
    "no_repeat_ngram_size": "it is called {no_repeat_ngram} here",
    "min_length": "{min_new_tokens} counts the new tokens, without the prompt",
    "logprobs": "it is called {top_logprobs} here",
    "max_length": "{max_new_tokens} counts the new tokens, without the prompt",
    "num_return_sequences": "it is called {num_return} here",
    "num_samples": "it is called {num_return} here",
    "n": "it is called {num_return} here",
    "n_best": "it is called {num_return} here",
    "best_of": "it is called {num_return} here",
    "do_sample": "{temperature}, {top_k} or {top_p} ask for samples, {beams} for a search",
    "generator": "{seed}, a number, is given instead",
    "random_state": "it is called {seed} here",
}
"""Names that other libraries and services have for the same, or nearly the same."""
