"""What a loaded bundle answers: generated texts and scored candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flamingo_export.runtime.timings import Timings


@dataclass(frozen=True, kw_only=True)
class Text:
    """One generated text; token_ids and their log-probabilities include `<EOC>` where it was reached."""

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float
    finished: bool
    """Whether it ended by itself, with `<EOC>` or a stop text, rather than at max_new_tokens."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """(token, log-probability) of the likeliest at each place, where they were asked for."""

    def __repr__(self) -> str:
        end = "finished" if self.finished else "cut at max_new_tokens"
        return f"{type(self).__name__}({self.text!r}, {len(self.token_ids)} tokens, score {self.score:.4g}, {end})"

    def fields(self) -> dict[str, Any]:
        """What files of answers and Triton's `result` hold of it, by the names there; `top_logprobs` only where they were asked for."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "token_logprobs": list(self.token_logprobs),
            "score": self.score,
            "finish_reason": "stop" if self.finished else "length",
            **({"top_logprobs": self.top_logprobs} if self.top_logprobs else {}),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Generation(Text):
    """The best text of a request, the others asked for by num_return (best first), and where its time went."""

    alternatives: tuple[Text, ...]
    timings: Timings

    def fields(self) -> dict[str, Any]:
        """As of each text, with the alternatives' own."""
        return {**super().fields(), "alternatives": [other.fields() for other in self.alternatives]}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A candidate answer with the sum of its tokens' log-probabilities, and these."""

    candidate: str
    logprob: float
    token_logprobs: tuple[float, ...]
