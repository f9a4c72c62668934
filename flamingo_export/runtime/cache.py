"""The KV cache: one buffer [B, H, C, D] for keys and one for values of each layer, growing in buckets, and what its rows hold."""

from __future__ import annotations

from collections.abc import Sequence

from flamingo_export.backends.base import Buffer, Session
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError

BUCKET = 128
"""Capacity grows in steps of this many slots: attention reads the whole capacity, growing copies it once. A compiled decoder has one."""

Key = int | bytes
"""What decides a prompt position's keys and values, besides the positions before it: its token id, or its medium's digest at an `<image>`."""


def slots_for(*, prompt: int, width: int, new_tokens: int, chunk: int) -> int:
    """Cache slots that a request needs at most.

    Decoding writes `width` slots a step after the prompt; a short prompt beside a long one is padded by up to a chunk.
    """
    return prompt + max(chunk, width * new_tokens)


def check_capacity(*, prompt: int, width: int, new_tokens: int, limits: ShapeLimits) -> None:
    """Raises CapacityError, before any work, if a request cannot fit, saying by how much and what would."""
    needed = slots_for(prompt=prompt, width=width, new_tokens=new_tokens, chunk=limits.chunk)
    if needed <= limits.max_length:
        return
    room = max(0, limits.max_length - prompt) // width
    hint = (
        f"Generate at most {room} tokens, use fewer beams"
        if prompt + limits.chunk <= limits.max_length and room
        else "Use fewer shots"
    )
    raise CapacityError(
        f"a prompt of {prompt} tokens with {width} beams of {new_tokens} new tokens needs {needed} cache slots, "
        f"the bundle allows {limits.max_length}. {hint}, or build with a larger --max-length."
    )


def check_positions(*, prompt: int, new_tokens: int, position_limit: int | None) -> None:
    """Raises CapacityError, before any work, if a request reaches beyond the positions that the model has (None: it has all)."""
    if position_limit is not None and prompt + new_tokens > position_limit:
        room = max(0, position_limit - prompt)
        raise CapacityError(
            f"a prompt of {prompt} tokens with {new_tokens} new ones needs {prompt + new_tokens} positions, the model has {position_limit}. "
            + (f"Generate at most {room} tokens, or use fewer shots." if room else "Use fewer shots.")
        )


class Cache:
    """Buffers bound to the decoder, and for each row the prompt that its first slots still hold."""

    def __init__(self, decoder: Session, limits: ShapeLimits) -> None:
        self._decoder = decoder
        self._limits = limits
        self._shapes = {
            tensor.name: tensor.shape for tensor in decoder.spec.inputs if tensor.name.startswith(("past_k.", "past_v."))
        }
        self._buffers: dict[str, Buffer] = {}
        self.batch = 0
        self.capacity = 0
        self._held: list[tuple[Key, ...]] = []

    def prepare(self, batch: int, slots: int) -> None:
        """Makes room for `batch` rows of `slots` slots, and binds these rows. Grown buffers keep what the old ones held.

        Raises CapacityError if more than the bundle's max_length is asked for.
        """
        if slots > self._limits.max_length:
            raise CapacityError(
                f"{slots} cache slots are needed, the bundle allows {self._limits.max_length}. Build with a larger --max-length."
            )
        if slots > self.capacity or batch > self.batch:
            bucket = self._decoder.largest.get("C") or min(-(-slots // BUCKET) * BUCKET, self._limits.max_length)
            try:
                self._reallocate(batch, max(self.capacity, bucket))
            except BaseException as error:
                # Some buffers are grown and some are not: none can be used, the next call begins anew.
                self._buffers, self._held, self.batch, self.capacity = {}, [], 0, 0
                if isinstance(error, MemoryError):
                    raise CapacityError(
                        f"no memory for a cache of {batch} x {bucket} slots. Use smaller batches or shorter prompts."
                    ) from error
                raise
        for name, buffer in self._buffers.items():
            self._decoder.bind(name, buffer.rows(batch))

    def _reallocate(self, batch: int, capacity: int) -> None:
        kept = min(batch, self.batch)
        for name, shape in self._shapes.items():
            _, heads, _, head_size = shape
            fresh = self._decoder.allocate(name, (batch, int(heads), capacity, int(head_size)))
            if kept:
                fresh.copy_from(self._buffers[name].rows(kept))
            # One buffer at a time: the old one goes before the next is made, so that growing never holds two caches.
            self._buffers[name] = fresh
            self._decoder.bind(name, fresh)
        self.batch, self.capacity = batch, capacity
        self._held = [*self._held[:kept], *[()] * (batch - kept)]

    def assign(self, prompts: Sequence[Sequence[Key]]) -> list[tuple[int, int]]:
        """(row, positions reused) for each prompt: rows 0 .. n - 1, given where the longest common beginning is already held.

        The last position is never reused: its logits are wanted. A row keeps only what is reused, until `hold` says more.
        """
        free = list(range(len(prompts)))
        placed: dict[int, tuple[int, int]] = {}
        held = [*self._held, *[()] * len(prompts)]
        scores = sorted(
            ((_common(prompt, held[row]), index, row) for index, prompt in enumerate(prompts) for row in free),
            key=lambda score: (-score[0], score[1], score[2]),
        )
        for shared, index, row in scores:
            if index not in placed and row in free:
                free.remove(row)
                placed[index] = (row, min(shared, len(prompts[index]) - 1))
        return [placed[index] for index in range(len(prompts))]

    def hold(self, row: int, prompt: Sequence[Key]) -> None:
        """Records what the first slots of `row` hold from now on."""
        self._held[row] = tuple(prompt)


def _common(one: Sequence[Key], other: Sequence[Key]) -> int:
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))
