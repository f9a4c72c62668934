"""Weights of a checkpoint: our own format, or one of the families whose checkpoints people have."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flamingo_export.bundle.manifest import SourceRecord
from flamingo_export.errors import CheckpointError
from flamingo_export.sources.base import TOWERS, combined_digest, towers_digest
from flamingo_reference.arrays import Array
from flamingo_reference.checkpoints.files.tensors import CheckpointError as UnreadableCheckpoint
from flamingo_reference.checkpoints.loading import CheckpointFiles, load


class CheckpointSource:
    """A checkpoint folder or file, with the language model, vision encoder and adapters that belong to it."""

    digested = True

    def __init__(self, files: CheckpointFiles | Path, *, may_be_absent: bool = False) -> None:
        """may_be_absent: shards that an index names need not be there, where nothing will be read.

        Raises CheckpointError if config or tensors are missing, of an unknown family, do not fit each other or are cut short.
        """
        if isinstance(files, Path):
            files = CheckpointFiles(path=files)
        try:
            self.checkpoint = load(files, may_be_absent=may_be_absent)
        except UnreadableCheckpoint as error:
            raise CheckpointError(str(error)) from error
        self.config, self.inputs = self.checkpoint.config, self.checkpoint.inputs
        self.notes = self.checkpoint.notes
        self.tokenizer, self.golden = self.checkpoint.tokenizer, self.checkpoint.golden
        self.text_tokenizer = self.checkpoint.text_tokenizer
        marks = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in self.checkpoint.files]
        content = msgspec.json.encode([marks, [str(path) for path in files.adapters], self.config])
        self.identity = f"checkpoint {hashlib.sha256(content).hexdigest()}"

    def names(self) -> list[str]:
        """All tensor names."""
        names = self.checkpoint.reader.names()
        return names if self.config.contrastive is not None else [name for name in names if not name.startswith(TOWERS)]

    def without_towers(self) -> CheckpointSource:
        """The same model without its contrastive encoder, as bundles were built before there was one."""
        found = copy.copy(self)
        found.config = msgspec.structs.replace(self.config, contrastive=None)
        found.text_tokenizer = None
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.checkpoint.reader.shape(name)

    def number_bytes(self) -> dict[str, int]:
        """Bytes of a number of each tensor, of those whose files are there."""
        found = {}
        for name in self.names():
            with contextlib.suppress(UnreadableCheckpoint):
                found[name] = self.checkpoint.reader.dtype(name).itemsize
        return found

    def read(self, name: str) -> Array:
        """A tensor, mapped from its file or made of what is there."""
        return self.checkpoint.reader.read(name)

    def record(self, digests: Mapping[str, str]) -> SourceRecord:
        """The digest of all tensors names the checkpoint."""
        return SourceRecord(
            kind="checkpoint",
            sha256=combined_digest(digests),
            towers_sha256=towers_digest(digests),
            family=self.checkpoint.family.name,
        )
