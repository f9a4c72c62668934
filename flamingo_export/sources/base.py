"""What every source of weights offers, and the digest by which weights are known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from flamingo_export.bundle.manifest import SourceRecord
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import InputFormat


class WeightSource(Protocol):
    """A model's tensors under the names of `flamingo_reference.names.expected_tensors`."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def identity(self) -> str:
        """Changes whenever the tensors do: an interrupted build resumes only where it is the same."""

    @property
    def digested(self) -> bool:
        """Whether the tensors are to be hashed while they are read, for `record`."""

    @property
    def inputs(self) -> InputFormat:
        """How images and text become the model's input."""

    @property
    def tokenizer(self) -> Path | None:
        """The model's tokenizer.json."""

    @property
    def text_tokenizer(self) -> Path | None:
        """The tokenizer.json of its contrastive encoder's text tower."""

    @property
    def golden(self) -> Path | None:
        """Folder of golden values recorded for these weights."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the model should know."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Array:
        """A tensor's numbers, in its own type (float64, float32, float16 or bfloat16) and any memory order; not to be written to.

        May be called from several threads at once.
        """

    def record(self, digests: Mapping[str, str]) -> SourceRecord:
        """What the manifest says of the source; digests: `tensor_digest` of each tensor, empty unless `digested`."""


TOWERS = "contrastive."
"""What the names of a contrastive encoder's tensors begin with."""


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of the model's tensors, from the SHA-256 of each. Those of a contrastive encoder do not count: the model is the same with
    and without one, and so are its golden values (`towers_digest`)."""
    return _digest({name: digest for name, digest in digests.items() if not name.startswith(TOWERS)})


def towers_digest(digests: Mapping[str, str]) -> str | None:
    """One digest of a contrastive encoder's tensors, from the SHA-256 of each; None where there are none."""
    found = {name: digest for name, digest in digests.items() if name.startswith(TOWERS)}
    return _digest(found) if found else None


def _digest(digests: Mapping[str, str]) -> str:
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(f"{name} {digests[name]}\n".encode())
    return total.hexdigest()


def tensor_digest(array: Array) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    contiguous = np.asarray(array, order="C")
    return hashlib.sha256(contiguous.reshape(-1).view(np.uint8).data).hexdigest()
