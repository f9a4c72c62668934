"""Weights of a checkpoint folder in our own format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flamingo_export.errors import CheckpointError
from flamingo_export.manifest import SourceRecord
from flamingo_export.sources.base import Array, combined_digest
from flamingo_reference.checkpoints import native
from flamingo_reference.checkpoints.tensors import CheckpointError as UnreadableCheckpoint
from flamingo_reference.config import ConfigError


class CheckpointSource:
    """A checkpoint folder: `config.json`, safetensors files, and where it has them `tokenizer/tokenizer.json` and `golden/`."""

    digested = True

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if config or tensors are missing, do not fit each other or are cut short."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; a checkpoint is one with config.json and model.safetensors.")
        try:
            self.config, self._reader = native.load_native(folder)
        except (UnreadableCheckpoint, ConfigError) as error:
            raise CheckpointError(str(error)) from error
        stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
        marks = [[str(folder.resolve()), name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        self.identity = f"checkpoint {hashlib.sha256(msgspec.json.encode([marks, self.config])).hexdigest()}"
        tokenizer, golden = folder / "tokenizer" / "tokenizer.json", folder / "golden"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.golden = golden if golden.is_dir() else None

    def names(self) -> list[str]:
        """All tensor names."""
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._reader.shape(name)

    def read(self, name: str) -> Array:
        """A tensor, mapped from its file."""
        return self._reader.read(name)

    def record(self, digests: Mapping[str, str]) -> SourceRecord:
        """The digest of all tensors names the checkpoint."""
        return SourceRecord(kind="checkpoint", sha256=combined_digest(digests))
