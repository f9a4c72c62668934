"""The generation loop: media, prefill, then {decoder, search} until every request is finished. One loop for all backends."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator as GeneratorType
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from flamingo_export.backends.base import Array
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import BusyError, InputError
from flamingo_export.runtime.cache import Cache
from flamingo_export.runtime.candidates import Scores, run_decoder
from flamingo_export.runtime.media_bank import MediaBank
from flamingo_export.runtime.media_encoder import MediaEncoder
from flamingo_export.runtime.prefill import Ints, PrefillRow, prefill
from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.search import Search, Step
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.runtime.tree import BeamTree
from flamingo_reference.config import ModelConfig
from flamingo_reference.phi import phi_after

Steps = GeneratorType[None, None, None]


@dataclass(kw_only=True)
class Timings:
    """Seconds of one batch, and what was reused.

    prepare: reading images and encoding text. media: encoding them. prefill: the prompt. steps: each decoding step, search included.
    """

    prepare: float = 0.0
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
        return self.prepare + self.media + self.prefill


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A batch whose prompts are in the cache, by cache row.

    requests: index of the request in each row. scores: candidates [B, n] or logits [B, V] after each prompt. media_rows [B, 1] and phi [B]:
    the medium that whatever follows looks at.
    """

    requests: Ints
    lengths: Ints
    scores: Scores
    media_rows: Ints
    phi: Ints


class Generator:
    """Owns the media bank and the cache, which outlive a request: the next one about the same images finds them there.

    One batch at a time; not for use from several threads at once.
    """

    def __init__(self, engines: Engines, config: ModelConfig, limits: ShapeLimits) -> None:
        self.config, self.limits = config, limits
        self.decoder = engines.decoder
        self._encoder = MediaEncoder(engines.vision_encoder, engines.resampler, engines.media_kv, config)
        self.bank = MediaBank(engines.decoder, limits.bank_rows)
        self.cache = Cache(engines.decoder, limits)
        self._busy = threading.Lock()

    def check(self, requests: Sequence[Prepared], width: int) -> None:
        """Raises InputError for what the engines or the bank cannot hold: branches of a request, frames of a video, media at once."""
        most = self.decoder.largest.get("S")
        if most is not None and width > most:
            raise InputError(f"{width} beams or samples of a request were asked for, the engine takes {most}. Ask for fewer.")
        for request in requests:
            self._encoder.check(request.media)
            self.bank.check(request.media)

    def prefetch(self, batch: Sequence[Prepared]) -> Iterator[None]:
        """Encodes media of the batch after this one into free rows of the bank, a few at each `next`, while steps of this one run.

        Nothing, where encoding would not overlap with them.
        """
        if self._encoder.asynchronous:
            media = [medium for request in batch for medium in request.media]
            yield from self.bank.prefetch(media, self._encoder.encode)

    def run(self, batch: Sequence[Prepared], searches: Sequence[Search], timings: Timings) -> Steps:
        """Carries the searches of a batch to their end, pausing (yield) after each step, so that a stream can look at them.

        All searches have the same width. Raises CapacityError before work if the batch's media do not fit the bank.
        """
        width = searches[0].width
        slots = max(len(request.token_ids) for request in batch) + width
        candidates = searches[0].num_candidates
        with self.filled(batch, slots, timings, candidates) as filled:
            order = filled.requests.tolist()
            tree = BeamTree(filled.lengths.tolist(), width, self.cache.capacity)
            feeds = _DecodeFeeds(filled, width, pad=self.config.tokens.pad, reset=self.config.tokens.reset)
            scores = filled.scores[:, None]
            active = dict(enumerate(order))
            started = time.perf_counter()
            while True:
                chosen = {row: searches[index].advance(scores[row]) for row, index in active.items()}
                active = {row: index for row, index in active.items() if chosen[row] is not None}
                if not active:
                    break
                paused = time.perf_counter()
                yield
                started += time.perf_counter() - paused  # what a stream's reader does is no part of the step
                # Rows behind the last unfinished one leave the batch; finished ones before it stay as padding.
                size = max(active) + 1
                needed = tree.slots_needed(size)
                if needed > self.cache.capacity or size != feeds.size:
                    self.cache.prepare(size, max(needed, self.cache.capacity))
                    if self.cache.capacity > tree.capacity:
                        tree.grow(self.cache.capacity)
                scores = run_decoder(self.decoder, feeds.next(tree, chosen, size), candidates)
                for row in active:
                    tree.commit(row)
                now = time.perf_counter()
                timings.steps.append(now - started)
                started = now

    @contextmanager
    def filled(
        self, batch: Sequence[Prepared], slots: int, timings: Timings, candidates: int | None = None
    ) -> Iterator[Filled]:
        """Media in the bank, pinned, and prompts in a cache of at least `slots` slots, for the length of a `with` block.

        candidates: best tokens wanted after each prompt, None for the logits of the whole vocabulary.
        """
        if not self._busy.acquire(blocking=False):
            raise BusyError(
                "another generation is still running on this model. Finish or close its stream first, or load the bundle twice."
            )
        try:
            media = [medium for request in batch for medium in request.media]
            started = time.perf_counter()
            with self.bank.lease(media, self._encoder.encode) as (bank_rows, use):
                encoded = time.perf_counter()
                timings.media += encoded - started
                timings.media_encoded += use.encoded
                timings.media_reused += use.reused
                filled = self._prefill(batch, bank_rows, slots, timings, candidates)
                timings.prefill += time.perf_counter() - encoded
                yield filled
        finally:
            self._busy.release()

    def _prefill(
        self,
        batch: Sequence[Prepared],
        bank_rows: dict[bytes, int],
        slots: int,
        timings: Timings,
        candidates: int | None,
    ) -> Filled:
        placed = self.cache.assign([request.keys for request in batch])
        order = np.argsort([row for row, _ in placed])
        rows = []
        for index in order.tolist():
            request = batch[index]
            media_rows = np.array([bank_rows[medium.digest] for medium in request.media], np.int64)
            rows.append(PrefillRow(token_ids=request.token_ids, phi=request.phi, media_rows=media_rows, start=placed[index][1]))
        # The slots that padding reaches: a short prompt beside a long one is written a chunk at a time too.
        padded = 0
        if len(rows) > 1:
            longest = min(self.limits.chunk, max(len(row.token_ids) - row.start for row in rows))
            padded = max(len(row.token_ids) for row in rows) + longest
        self.cache.prepare(len(batch), max(slots, padded))
        for place, row in enumerate(rows):
            self.cache.hold(place, batch[order[place]].keys[: row.start])
        scores = prefill(
            self.decoder,
            rows,
            capacity=self.cache.capacity,
            chunk=self.limits.chunk,
            pad=self.config.tokens.pad,
            candidates=candidates,
            written=lambda place, length: self.cache.hold(place, batch[order[place]].keys[:length]),
        )
        timings.prompt_tokens += sum(len(row.token_ids) for row in rows)
        timings.reused_tokens += sum(row.start for row in rows)
        reset = self.config.tokens.reset
        phi = np.array([phi_after(row.token_ids, row.phi, reset) for row in rows], np.int64)
        media_rows = np.array([row.media_rows[last - 1] if last else 0 for row, last in zip(rows, phi, strict=True)], np.int64)
        lengths = np.array([len(row.token_ids) for row in rows], np.int64)
        return Filled(requests=order, lengths=lengths, scores=scores, media_rows=media_rows[:, None], phi=np.minimum(phi, 1))


class _DecodeFeeds:
    """Inputs of decoding steps, allocated once."""

    def __init__(self, filled: Filled, width: int, *, pad: int, reset: int | None) -> None:
        batch = len(filled.requests)
        self.size = batch
        self._tokens = np.full((batch, width), pad, np.int64)
        self._pad, self._reset = pad, reset
        self._phi = np.repeat(filled.phi[:, None], width, axis=1)
        self._following = self._phi.copy()
        """phi of whatever continues each branch: 0 once it has come to the reset."""
        self._media_rows = filled.media_rows
        self._logit_positions = np.tile(np.arange(width, dtype=np.int64), (batch, 1))

    def next(self, tree: BeamTree, chosen: dict[int, Step | None], size: int) -> dict[str, Array]:
        """Inputs of the step that runs what the searches chose, for the first `size` rows."""
        for row, step in chosen.items():
            if step is not None:
                tree.step(row, step.parents)
                self._tokens[row] = step.tokens
                self._phi[row] = self._following[row][step.parents]
                self._following[row] = np.where(self._tokens[row] == self._reset, 0, self._phi[row])
            elif row < size:
                tree.retire(row)
                self._tokens[row] = self._pad
        self.size = size
        positions = tree.positions(size)
        return {
            "token_ids": self._tokens[:size],
            "positions": np.repeat(positions[:, None], tree.width, axis=1),
            "media_rows": self._media_rows[:size],
            "phi": self._phi[:size],
            "write_index": tree.used[:size],
            "mask": tree.mask[:size],
            "key_positions": tree.key_positions[:size],
            "logit_positions": self._logit_positions[:size],
        }
