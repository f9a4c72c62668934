"""From a decoder case to calls: what is fed to a decoder session, and which token of which sequence each position is.

The reference sees whole *sequences*: one a request, or one for each leaf of a tree of beams. The engine sees *calls*: chunks of prefill,
then decoding, with cache slots and masks as the runtime uses them (design: write_index + S <= C always, a padded position sees its own
slot, active rows are a dense prefix).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.validate.expected.cases import BeamSteps, DecoderCase, Request, image_rows
from flamingo_export.validate.report.parity_report import Strip
from flamingo_reference.arrays import Ints
from flamingo_reference.config import ModelConfig
from flamingo_reference.phi import media_ranges, phi_from_tokens


class TokenSequence(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens from position 0, with the image that each `<image>` among them shows."""

    tokens: tuple[int, ...]
    media: tuple[int, ...]

    def rows(self, config: ModelConfig) -> list[int]:
        """Bank rows of all its media, in order."""
        return [row for image in self.media for row in image_rows(config, image)]

    def seen(self, config: ModelConfig) -> tuple[Ints, Ints]:
        """(first, phi) [S]: each position sees its media first to phi, counted from 1; phi 0: none."""
        ids = np.asarray([self.tokens])
        if config.sees_groups:
            counts = np.array([[len(image_rows(config, image)) for image in self.media]], np.int64)
            first, phi = media_ranges(ids, config.tokens.image, counts)
            return first[0], phi[0]
        (phi,) = phi_from_tokens(ids, config.tokens.image, config.tokens.reset)
        return phi, phi


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the decoder. `feeds` lacks token_ids / hidden and banks and caches; `origin` [B, S, 2] is (sequence, position)."""

    feeds: dict[str, npt.NDArray[np.generic]]
    token_ids: Ints
    origin: Ints
    """-1 where a position is padding."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A case ready to run: the reference's sequences, the engine's calls, rows and capacity of the cache.

    slots[b, c]: (sequence, position) that cache slot c of row b holds at the end, -1 where it holds nothing of interest.
    """

    sequences: tuple[TokenSequence, ...]
    calls: tuple[Call, ...]
    batch: int
    capacity: int
    slots: Ints


def plan_case(config: ModelConfig, case: DecoderCase, largest: Mapping[str, int] = MappingProxyType({})) -> Plan:
    """The calls of a case; the cache has exactly as many slots as they need.

    largest: S positions and M media of a prefill call at most; those without a bound go as the case says, with all of a request's media.
    """
    return _Planner(config, case, largest).plan()


def strips(config: ModelConfig, case: DecoderCase) -> tuple[Strip, ...]:
    """The sequences of a case as the report shows them."""
    shown = []
    for index, sequence in enumerate(plan_case(config, case).sequences):
        phi = phi_from_tokens(np.asarray([sequence.tokens]), config.tokens.image, config.tokens.reset)[0].tolist()
        rows = [sequence.media[seen - 1] + 1 if seen else 0 for seen in phi]
        tokens = (-row if token == config.tokens.image else row for token, row in zip(sequence.tokens, rows, strict=True))
        request = case.requests[0 if case.beams else index]
        shown.append(Strip(tokens=tuple(tokens), prompt=request.prompt))
    return tuple(shown)


class _Position(msgspec.Struct, frozen=True, kw_only=True):
    """A position to be fed: where it belongs, its token, its phi, the slots it may see besides its own."""

    sequence: int
    position: int
    token: int
    sees: tuple[int, ...]


class _Planner:
    def __init__(self, config: ModelConfig, case: DecoderCase, largest: Mapping[str, int]) -> None:
        self.config, self.case = config, case
        self.bounded = "M" in largest
        self.sequences = [TokenSequence(tokens=request.tokens, media=request.media) for request in case.requests]
        self.chunk = min(case.chunk, largest.get("S", case.chunk), self._looking(largest.get("M", case.chunk)))
        self.steps: list[tuple[list[list[_Position]], bool]] = []
        """Rows of positions of each call, and whether it is a decoding call (M = 1)."""

    def plan(self) -> Plan:
        self._prefill()
        if self.case.beams is None:
            self._decode()
        else:
            self._beam_steps(self.case.requests[0], self.case.beams)
        batch = len(self.case.requests)
        filled = [0] * batch
        capacity = 0
        for rows, _ in self.steps:
            width = max(len(row) for row in rows)
            capacity = max(capacity, *(filled[index] + width for index in range(len(rows))))
            for index, row in enumerate(rows):
                filled[index] += len(row)
        slots = np.full((batch, capacity, 2), -1, np.int64)
        write = [0] * batch
        key_positions = np.zeros((batch, capacity), np.int64)
        calls = []
        for rows, decoding in self.steps:
            calls.append(self._call(rows, decoding, write, key_positions, slots))
            for index, row in enumerate(rows):
                write[index] += len(row)
        return Plan(sequences=tuple(self.sequences), calls=tuple(calls), batch=batch, capacity=capacity, slots=slots)

    def _prefill(self) -> None:
        start = 0
        while True:
            rows = []
            for index, request in enumerate(self.case.requests):
                stop = min(request.prompt, start + self.chunk)
                rows.append(
                    [
                        _Position(sequence=index, position=at, token=request.tokens[at], sees=tuple(range(at)))
                        for at in range(start, stop)
                    ]
                )
            if not any(rows):
                return
            if not self.case.keep_rows:
                while not rows[-1]:
                    rows.pop()
            self.steps.append((rows, False))
            start += self.chunk

    def _decode(self) -> None:
        longest = max(len(request.tokens) - request.prompt for request in self.case.requests)
        for step in range(longest):
            rows = []
            for index, request in enumerate(self.case.requests):
                at = request.prompt + step
                rows.append([_Position(sequence=index, position=at, token=request.tokens[at], sees=tuple(range(at)))])
            self.steps.append((rows, True))

    def _beam_steps(self, request: Request, beams: BeamSteps) -> None:
        """Every node is given to one leaf's sequence; nodes shared by leaves compute the same for each of them."""
        width, prompt = len(beams.tokens[0]), request.prompt
        paths: list[list[tuple[int, int]]] = [[] for _ in range(width)]  # (step, beam) of each beam's ancestors
        leaves: list[list[tuple[int, int]]] = []
        for step, (parents, _) in enumerate(zip(beams.parents, beams.tokens, strict=True)):
            leaves += [path for beam, path in enumerate(paths) if step and beam not in parents]
            paths = [[*paths[parent], (step, beam)] for beam, parent in enumerate(parents)]
        leaves += paths
        owner: dict[tuple[int, int], int] = {}
        self.sequences = []
        for index, path in enumerate(leaves):
            tokens = request.tokens[:prompt] + tuple(beams.tokens[step][beam] for step, beam in path)
            self.sequences.append(TokenSequence(tokens=tokens, media=request.media))
            for node in path:
                owner.setdefault(node, index)
        for step in range(len(beams.tokens)):
            row = []
            for beam in range(width):
                index = owner[step, beam]
                ancestors = leaves[index][:step]
                sees = (*range(prompt), *(prompt + at * width + which for at, which in ancestors))
                row.append(_Position(sequence=index, position=prompt + step, token=beams.tokens[step][beam], sees=sees))
            self.steps.append(([row], True))

    def _looking(self, most: int) -> int:
        """Positions that look at no more than `most` media together, whichever they are."""
        spans = [int((phi - first).max()) + 1 for first, phi in (sequence.seen(self.config) for sequence in self.sequences)]
        return max(1, most // max(spans))

    def _seen(self, at: _Position) -> range:
        """Numbers of the media that a position sees of its sequence's, from 1."""
        first, phi = (bound[at.position] for bound in self.sequences[at.sequence].seen(self.config))
        return range(first, phi + 1) if phi else range(0)

    def _media(self, row: list[_Position]) -> list[int]:
        """Numbers of the media that a prefill call names for a row: all of its request's, or where they are bounded those looked at."""
        if not self.bounded:
            return list(range(1, len(self.sequences[row[0].sequence].rows(self.config)) + 1)) if row else []
        return sorted({number for at in row for number in self._seen(at)})

    def _call(self, rows: list[list[_Position]], decoding: bool, write: list[int], key_positions: Ints, slots: Ints) -> Call:
        """Feeds of one call; `key_positions` and `slots` are brought up to date in place."""
        ids = self.config.tokens
        batch, width, capacity = len(rows), max(len(row) for row in rows), slots.shape[1]
        token_ids = np.full((batch, width), ids.pad, np.int64)
        positions = np.zeros((batch, width), np.int64)
        first, phi = np.zeros((2, batch, width), np.int64)
        mask = np.zeros((batch, 1, width, capacity), np.bool_)
        origin = np.full((batch, width, 2), -1, np.int64)
        media = [list(self._seen(row[0])) if decoding and row else self._media(row) for row in rows]
        media_rows = np.zeros((batch, max(1, *map(len, media))), np.int64)
        for b, row in enumerate(rows):
            for s, at in enumerate(row):
                numbers, bank = self._seen(at), self.sequences[at.sequence].rows(self.config)
                if numbers:
                    first[b, s], phi[b, s] = (media[b].index(number) + 1 for number in (numbers[0], numbers[-1]))
                media_rows[b, : len(media[b])] = [bank[number - 1] for number in media[b]]
                token_ids[b, s], positions[b, s] = at.token, at.position
                origin[b, s] = at.sequence, at.position
                slot = write[b] + s
                mask[b, 0, s, [*at.sees, slot]] = True
                key_positions[b, slot] = at.position
                slots[b, slot] = at.sequence, at.position
            for s in range(len(row), width):
                mask[b, 0, s, write[b] + s] = True
        feeds: dict[str, npt.NDArray[np.generic]] = {
            "positions": positions,
            "media_rows": media_rows,
            "phi": phi,
            "first_media": first,
            "write_index": np.asarray(write[:batch], np.int64),
            "mask": mask,
            "key_positions": key_positions[:batch].copy(),
        }
        return Call(feeds=feeds, token_ids=token_ids, origin=origin)
