"""Where the time of a request went."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Timings:
    """Seconds of one request on the clock, what ran for its neighbours meanwhile included, and what was reused.

    prepare: reading its images and encoding its text.
    queued: waiting for a cache row.
    media: until its media were encoded.
    prefill: until its first token was chosen.
    steps: from each token to the next.
    """

    prepare: float = 0.0
    queued: float = 0.0
    media: float = 0.0
    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    media_encoded: int = 0
    media_reused: int = 0

    @property
    def first_token(self) -> float:
        """From the request to the first token."""
        return self.prepare + self.queued + self.media + self.prefill
