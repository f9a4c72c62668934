"""Measures what the engine's actions cost, by the shapes of their calls: the engine itself runs them, one action at a time."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from flamingo_export.deploy.capacity.costs import StepCosts
from flamingo_export.errors import InputError
from flamingo_export.runtime.beam_search import BeamSearch
from flamingo_export.runtime.cache import BUCKET
from flamingo_export.runtime.loop import Loop
from flamingo_export.runtime.media import medium_of
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Prepared, prepared_from_ids
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import Search, StopRule
from flamingo_export.runtime.ticket import Ticket

_WARM_UP = 2
"""Steps after a change of shape that are not counted."""
_JPEG = (640, 480)


class GridMeter:
    """Measures on one model, which nobody else uses meanwhile."""

    def __init__(
        self,
        model: Model,
        *,
        widths: Sequence[int],
        rows: int | Sequence[int],
        repeat: int,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """widths: branches of a request. rows: requests side by side at most, or all numbers of them that are measured. repeat: measurements
        of a shape; their median counts.

        clock: of seconds; that of the processor's time leaves out what other programs take.
        """
        self._model, self._repeat, self._clock = model, repeat, clock
        self.widths = tuple(sorted(set(widths)))
        if isinstance(rows, int):
            rows = [*(1 << power for power in range(rows.bit_length())), rows]
        self.rows = tuple(sorted(set(rows)))
        self._rng = np.random.default_rng(seed)
        self._pictures = 0
        ids = model.config.tokens
        special = {ids.pad, ids.bos, ids.eoc, ids.image, *ids.never, *ids.stops}
        self._words = np.array([token for token in range(model.config.language_model.vocab_size) if token not in special])

    def measure(self, slots: int) -> StepCosts:
        """Costs up to `slots` cache slots a row, and at a lower number of them, which the cache has before it grows.

        Raises InputError where so many do not hold the steps that are to be measured.
        """
        model = self._model
        limits, largest = model.manifest.limits, model.engines.decoder.largest
        high = largest.get("C") or min(-(-slots // BUCKET) * BUCKET, limits.max_length)
        steps, needed = self._needed(high)
        low = -(-needed // BUCKET) * BUCKET
        levels = (low, high) if low < high else (high,)
        chunks = tuple(sorted({min(size, limits.chunk, levels[0] - 1) for size in (8, 64, limits.chunk)}))
        frames = tuple(sorted({1, min(4, model.engine.loop.encoder.frames), model.engine.loop.encoder.frames}))
        decode: dict[tuple[int, int, int], float] = {}
        prefill: dict[tuple[int, int], float] = {}
        with model.engine.by_hand() as loop:
            encode = [self._encoding(loop, count) for count in frames]
            for level in levels:
                for width in self.widths:
                    for rows, seconds in zip(self.rows, self._decoding(loop, level, width, steps), strict=True):
                        decode[rows, width, level] = seconds
                for chunk in chunks:
                    prefill[chunk, level] = self._prefilling(loop, chunk)
            copy = self._copying(loop, levels[-1])
        return StepCosts(
            rows=self.rows,
            widths=self.widths,
            slots=levels,
            decode=tuple(tuple(tuple(decode[r, w, s] for s in levels) for w in self.widths) for r in self.rows),
            chunks=chunks,
            prefill=tuple(tuple(prefill[chunk, level] for level in levels) for chunk in chunks),
            frames=frames,
            encode=tuple(encode),
            copy_slot=copy,
            prepare_image=self._preparing(),
            limits=limits,
            fixed_capacity="C" in largest,
            asynchronous=model.engines.vision_encoder.asynchronous,
        )

    def steps(self, slots: int) -> dict[tuple[int, int], float]:
        """Median seconds of a step by (requests side by side, branches of each), each request with about so many slots in use and an image of
        its own.

        Raises InputError where the slots do not hold the steps that are to be measured, or the media bank not the images.
        """
        bank = self._model.manifest.limits.bank_rows
        if self.rows[-1] > bank:
            raise InputError(
                f"{self.rows[-1]} requests show an image each, the bundle's media bank holds {bank}. Measure fewer."
            )
        slots = min(slots, self._model.manifest.limits.max_length)
        steps, _ = self._needed(slots)
        with self._model.engine.by_hand() as loop:
            return {
                (rows, width): seconds
                for width in self.widths
                for rows, seconds in zip(self.rows, self._decoding(loop, slots, width, steps), strict=True)
            }

    def _needed(self, high: int) -> tuple[int, int]:
        """Steps that a request takes at most, and slots that it needs for them; InputError where these are more than `high`."""
        steps = (_WARM_UP + self._repeat) * len(self.rows) + 1
        needed = self.widths[-1] * steps + 2
        if needed > high:
            raise InputError(
                f"{steps} steps of {self.widths[-1]} beams need {needed} cache slots, {high} were to be used. "
                "Measure fewer (--repeat), fewer beams (--beams), or on longer prompts (--prompt-tokens)."
            )
        return steps, needed

    def _decoding(self, loop: Loop, level: int, width: int, steps: int) -> list[float]:
        """Median seconds of a step with each number of rows, as requests join whose prompts and steps together fill `level` slots."""
        tickets: list[Ticket[object]] = []
        found = []
        for rows in self.rows:
            while len(tickets) < rows:
                tickets.append(self._submit(self._prompt(level - width * steps, images=1), width, steps + 1))
            while len(loop.schedule.decoding) < rows:
                loop.tick()
                loop.schedule.decoded()  # those that run already wait for the others: their steps are counted
            times = [self._tick(loop) for _ in range(_WARM_UP + self._repeat)]
            found.append(median(times[_WARM_UP:]))
        self._give_up(loop, tickets)
        return found

    def _prefilling(self, loop: Loop, chunk: int) -> float:
        """Median seconds of a prompt of `chunk` tokens."""
        times = []
        for _ in range(self._repeat + 1):
            ticket = self._submit(self._prompt(chunk, images=0), 1, 1)
            loop.tick()  # admitted
            loop.tick()  # nothing to encode
            times.append(self._tick(loop))
            assert ticket.done
        return median(times[1:])

    def _encoding(self, loop: Loop, images: int) -> float:
        """Median seconds of one call of the vision encoder with `images` images, and what follows up to the bank."""
        waits = self._model.engines.vision_encoder.asynchronous
        # There the call returns before the work is done, and the prompt that follows waits for it.
        prompt = self._prefilling(loop, images + 1) if waits else 0.0
        times = []
        for _ in range(self._repeat + 1):
            self._submit(self._prompt(images + 1, images=images), 1, 1)
            loop.tick()  # admitted
            encoding, following = self._tick(loop), self._tick(loop)
            times.append(max(encoding + following - prompt, 1e-6) if waits else encoding)
            while loop.tick():
                pass
        return median(times[1:])

    def _copying(self, loop: Loop, level: int) -> float:
        """Seconds for each slot that a request takes from a row in use."""
        shared = level - 8
        if len(self.rows) == 1 or shared < 2 * BUCKET // 8:
            return 0.0
        times = []
        for _ in range(self._repeat + 1):
            prompt = self._prompt(shared, images=0)
            first = self._submit(prompt, 1, 4)
            while not loop.schedule.decoding:
                loop.tick()
            second = self._submit(prompt, 1, 4)
            times.append(self._tick(loop))
            self._give_up(loop, [first, second])
        return median(times[1:]) / shared

    def _preparing(self) -> float:
        """Median seconds to read, decode and scale a JPEG."""
        from PIL import Image

        from flamingo_export.runtime.images import load_image

        width, height = _JPEG
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        file = io.BytesIO()
        picture = np.stack([across % 256, down % 256, (across * down // 97) % 256], axis=-1).astype(np.uint8)
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        times = []
        for _ in range(self._repeat + 1):
            started = self._clock()
            medium_of([load_image(file.getvalue())], self._model.config)
            times.append(self._clock() - started)
        return median(times[1:])

    def _prompt(self, length: int, *, images: int) -> Prepared:
        """Random tokens, `images` tags among the first of them, and images that were never shown."""
        config = self._model.config
        ids = self._rng.choice(self._words, length)
        ids[:images] = config.tokens.image
        side = config.vision.image_size
        media = tuple(medium_of([self._rng.integers(0, 256, (side, side, 3), dtype=np.uint8)], config) for _ in range(images))
        return prepared_from_ids(ids.astype(np.int64), media, config)

    def _submit(self, prompt: Prepared, width: int, new_tokens: int) -> Ticket[object]:
        """A request that ends after so many tokens and not before."""
        rule = StopRule(eoc=-1, banned=self._model.config.tokens.never, max_new_tokens=new_tokens)
        search: Search = BeamSearch(rule, beams=width) if width > 1 else Sampling(rule)
        return self._model.engine.submit_search(prompt, search, wake=False)  # type: ignore[return-value]

    def _give_up(self, loop: Loop, tickets: Sequence[Ticket[object]]) -> None:
        for ticket in tickets:
            if not ticket.done:
                loop.revoked.append(ticket)
        while loop.tick() or loop.size:
            pass

    def _tick(self, loop: Loop) -> float:
        """Seconds of one action."""
        started = self._clock()
        loop.tick()
        return self._clock() - started
