"""What changes a search's choices: penalties, biases and bans, as transformers' logits processors of the same names, and texts that end it.

They act on the numbers that tokens are chosen by: logits for greedy and samples, log-probabilities for beams, as in transformers. What is
reported of a token is the model's own log-probability, before any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Changes of a branch's scores.

    prompt: token ids before the generated ones; penalties count them too.
    logit_bias: added to the scores of these tokens.
    repetition_penalty: of every token that was there already; above 1 makes it less likely.
    no_repeat_ngram: no sequence of so many tokens comes twice; 0 allows it.
    min_new_tokens: tokens before one of `ends` may be chosen.
    """

    prompt: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0

    def apply(self, scores: Floats, generated: Sequence[int]) -> None:
        """Changes the scores [V] of what follows the prompt and `generated`, in place, in transformers' order."""
        for token, bias in self.logit_bias.items():
            scores[token] += bias
        tokens = [*self.prompt, *generated]
        if self.repetition_penalty != 1.0:
            seen = np.unique(tokens)
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * self.repetition_penalty, values / self.repetition_penalty)
        if self.no_repeat_ngram:
            scores[self._repeating(tokens)] = -np.inf
        if len(generated) < self.min_new_tokens:
            scores[list(self.ends)] = -np.inf

    def _repeating(self, tokens: list[int]) -> list[int]:
        """Tokens that would complete a sequence that has been there."""
        size = self.no_repeat_ngram
        if len(tokens) + 1 < size:
            return []
        last = tokens[len(tokens) - size + 1 :]
        return [tokens[at + size - 1] for at in range(len(tokens) - size + 1) if tokens[at : at + size - 1] == last]


@dataclass(frozen=True)
class StopTexts:
    """Texts that end a branch: its tokens up to the one that completes the first of them."""

    texts: tuple[str, ...]
    decode: Decode

    def __call__(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these new tokens contains one."""
        text = self.decode(token_ids)
        return any(stop in text for stop in self.texts)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class HoldBack:
    """Pieces of a stream up to the first stop text: what may yet become one is held back, and so are blanks before it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._ended = False

    def push(self, piece: str) -> str:
        """What is certain now; nothing any more after a stop text."""
        if self._ended or not self._stops:
            return "" if self._ended else piece
        text = self._held + piece
        cut = cut_at(text, self._stops)
        if len(cut) < len(text):
            self._ended, self._held = True, ""
            return cut.rstrip()
        longest = max(
            (
                size
                for stop in self._stops
                for size in range(min(len(stop) - 1, len(text)), 0, -1)
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        certain = text[: len(text) - longest].rstrip() if longest else text
        self._held = text[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back and became no stop text."""
        held, self._held = self._held, ""
        return held
