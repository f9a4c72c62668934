"""Answers of a given form: a JSON schema, a regular expression, or one of several texts.

llguidance (extra `constraints`) says which tokens may follow; the others are never chosen. An answer begins with a blank, as words do in running
text, or without one: the blank is not part of the text that is returned, so both are allowed.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import InputError, pip_install
from flamingo_reference.config import ModelConfig

MAX_GRAMMAR = 1 << 16
"""Characters of a schema, an expression, or all choices together."""
_KEPT = 64
"""Forms that are kept compiled."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Of llguidance, so that no schema takes more than about a second, a step of it tens of milliseconds, or all memory."""
_SPACING = {"whitespace_flexible": True, "whitespace_pattern": " ?"}
"""Between the parts of JSON: one blank at most, else a model may continue with blanks for ever."""

JsonSchema = Mapping[str, Any] | bool
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an answer must look like; one of the three is given.

    json_schema: the answer is JSON that it allows. regex: the whole answer matches. choice: the answer is one of these.
    """

    json_schema: JsonSchema | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def grammar(self) -> str:
        """In llguidance's variety of Lark. Raises InputError if it is too long, or not JSON."""
        if self.json_schema is not None:
            schema = self.json_schema
            if isinstance(schema, Mapping):
                schema = {"x-guidance": _SPACING, **schema}
            try:
                text = json.dumps(schema)
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"the JSON schema is not JSON: {error}") from None
            name, rule = "JSON schema", f"%json {text}"
        elif self.regex is not None:
            # Anchors add nothing where the whole answer must match.
            pattern = self.regex.removeprefix("^")
            if pattern.endswith("$") and not pattern.endswith("\\$"):
                pattern = pattern[:-1]
            name, rule = "regular expression", f"/(?:{_slashes_escaped(pattern)})/"
        else:
            name, rule = "list of choices", " | ".join(map(_quoted, self.choice))
        if any("\ud800" <= letter <= "\udfff" for letter in rule):
            raise InputError(f"the {name} has half a surrogate pair in it. Write whole characters.")
        if len(rule) > MAX_GRAMMAR:
            raise InputError(f"the {name} has {len(rule)} characters, at most {MAX_GRAMMAR} are read. Give a shorter one.")
        return f'start: " "? answer\nanswer: {rule}\n'


class Forms:
    """Compiles forms for a tokenizer, and keeps those that were used last. Safe from any thread."""

    def __init__(self, tokenizer_json: Callable[[], str], config: ModelConfig) -> None:
        """tokenizer_json: gives that of the `tokenizers` library; called when the first form is compiled, since writing a large one takes long.
        config: of the model, for its vocabulary and the tokens that end a text."""
        self._json, self._size = tokenizer_json, config.language_model.vocab_size
        self._ends = tuple(token for token in config.tokens.stops if token not in config.tokens.never)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, form: Form) -> Guide:
        """A fresh guide for one request.

        Raises InputError where llguidance is not installed, the tokenizer is of a kind it does not know, or the form is faulty, too large, or
        satisfied by nothing.
        """
        grammar = form.grammar()
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Guide(matcher.deep_copy(), self._size, self._ends)

    def _compile(self, grammar: str) -> Any:
        try:
            import llguidance
        except ImportError:
            raise InputError(
                f"answers of a given form need llguidance: {pip_install('constraints')}. Or leave out json_schema, regex and choice."
            ) from None
        if self._tokenizer is None:
            written = self._json()
            try:
                self._tokenizer = llguidance.LLTokenizer(written, eos_token=list(self._ends))
            except Exception as error:  # the library raises ValueError and its own
                raise InputError(
                    f"the bundle's tokenizer cannot be constrained ({error}): tokens must be made of bytes, or of characters with bytes "
                    "beside them"
                ) from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))
        _check(matcher)
        return matcher


class Guide:
    """Which tokens may follow in one request's branches."""

    def __init__(self, matcher: Any, vocab_size: int, ends: Sequence[int]) -> None:
        self._size, self._ends = vocab_size, list(ends)
        self._states: dict[tuple[int, ...], Any] = {(): matcher}
        """A matcher for each text that is a branch, or was a step ago."""
        self._length = 0

    def allowed(self, generated: Sequence[int]) -> Mask:
        """Tokens that may follow these, bool [V]; those that end the text where it is complete.

        Raises InputError where the form turns out too complex, or cannot be spelled with the model's tokens.
        """
        matcher = self._state(tuple(generated))
        found = np.zeros(self._size, np.bool_)
        if matcher.is_stopped() and not matcher.is_error():
            found[self._ends] = True
            return found
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _check(matcher)
        tokens = np.unpackbits(bits, bitorder="little")[: self._size].astype(np.bool_)
        found[: len(tokens)] = tokens
        if not found.any():
            raise InputError("the answer cannot go on: what the form asks for next cannot be spelled with the model's tokens")
        return found

    def _state(self, generated: tuple[int, ...]) -> Any:
        if len(generated) > self._length:  # a step further: what is older than its parents is not asked for again
            self._length = len(generated)
            self._states = {text: state for text, state in self._states.items() if len(text) >= self._length - 1}
        if generated not in self._states:
            state = self._states[generated[:-1]].deep_copy()
            state.consume_token(generated[-1])
            _check(state)
            self._states[generated] = state
        return self._states[generated]


def _check(matcher: Any) -> None:
    if matcher.is_error():
        text = " ".join(matcher.get_error().split("<non-verbose/>")[0].split())
        raise InputError(f"the answer's form cannot be followed: {text[:300]}")


def _quoted(text: str) -> str:
    """As a string of the grammar, which is one of JSON's, but has no place for the character DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _slashes_escaped(pattern: str) -> str:
    """The expression between slashes: those in it that are not escaped yet are."""
    found, escaped = [], False
    for letter in pattern:
        found.append("\\/" if letter == "/" and not escaped else letter)
        escaped = letter == "\\" and not escaped
    return "".join(found)
