"""A loaded bundle as what is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_export.backends.base import SessionOptions
from flamingo_export.bundle.identity import bundle_digest, precision_of
from flamingo_export.errors import CapacityError, ImageError
from flamingo_export.evaluation.protocol import Answer, Features
from flamingo_export.runtime.media import MediumSource, rows_of
from flamingo_export.runtime.request import Request
from flamingo_reference.input_format import InputFormat

if TYPE_CHECKING:
    from flamingo_export.evaluation.index.encoder import Encoder
    from flamingo_export.runtime.model import Model


class BundleModel:
    """A `Model` behind the protocol. Closing it is up to whoever loaded the model."""

    def __init__(self, model: Model, *, batch_size: int = 8) -> None:
        """batch_size: requests that are run together at most."""
        self.model, self._batch_size = model, batch_size

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Name, digest of all files, precision, backend and how parity stands."""
        manifest = self.model.manifest
        return {
            "name": self.model.bundle.name,
            "digest": bundle_digest(manifest),
            "precision": precision_of(manifest),
            "backend": self.model.backend.name,
            "parity": manifest.parity.state,
        }

    @property
    def inputs(self) -> InputFormat:
        """The bundle's."""
        return self.model.inputs

    def check(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> None:
        """Raises CapacityError naming how much the longest request takes and how much there is."""
        limits, tokenizer = self.model.manifest.limits, self.model.tokenizer
        if not requests:
            return
        sizes: dict[object, int] = {}
        rows, media = max(self._shown(request, sizes) for request in requests)
        if rows > limits.bank_rows:
            tiles = f" of {rows} tiles" if rows > media else ""
            raise CapacityError(
                f"a prompt shows {media} images{tiles}, the bundle's media bank holds {limits.bank_rows}. Give fewer shots, "
                "or build it with a larger bank (limits=ShapeLimits(bank_rows=...))."
            )
        if tokenizer is None:
            return
        longest = max((request.prompt for request in requests if isinstance(request.prompt, str)), key=len, default="")
        tokens = len(tokenizer.encode(longest))
        needed = tokens + max(limits.chunk, beams * max_new_tokens)
        if needed > limits.max_length:
            raise CapacityError(
                f"the longest prompt has {tokens} tokens and needs {needed} cache slots with {beams} beams and {max_new_tokens} new tokens; "
                f"the bundle has {limits.max_length}. Give fewer shots, or build it with more (limits=ShapeLimits(max_length=...))."
            )

    def _shown(self, request: Request, sizes: dict[object, int]) -> tuple[int, int]:
        """Rows of the media bank that a prompt's images take, and how many there are. sizes: those that are known, filled on the way."""
        media = {str(medium) if isinstance(medium, str | Path) else id(medium): medium for medium in request.media}
        for key, medium in media.items():
            if key not in sizes:
                try:
                    sizes[key] = rows_of(medium, self.model.config)
                except ImageError:  # said with the item's name once it is looked at
                    sizes[key] = 1
        return sum(sizes[key] for key in media), len(media)

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[Answer]:
        """The best text for each request."""
        found = self.model.generate(list(requests), batch_size=self._batch_size, beams=beams, max_new_tokens=max_new_tokens)
        return [
            Answer(text=each.text, token_ids=each.token_ids, token_logprobs=each.token_logprobs, finished=each.finished)
            for each in found
        ]

    def score(self, requests: Sequence[Request], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods of each request's candidates."""
        return [
            [found.logprob for found in self.model.score(request, list(choices))]
            for request, choices in zip(requests, candidates, strict=True)
        ]

    def features(self, media: Sequence[MediumSource]) -> Features:
        """Vectors to compare media by, float32 [N, E]: `features_of` says which."""
        return self._encoder.encode(media)

    @property
    def features_of(self) -> str:
        """What they are."""
        from flamingo_export.evaluation.index.encoder import features_of

        return features_of(self.model.manifest)

    @cached_property
    def _encoder(self) -> Encoder:
        from flamingo_export.evaluation.index.encoder import Encoder

        return Encoder(self.model.bundle, self.model.manifest, self.model.backend, SessionOptions(threads=self.model.threads))
