"""The opened subgraphs of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flamingo_export.backends.base import Backend, Session, SessionOptions
from flamingo_export.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Engines:
    """One session a subgraph."""

    vision_encoder: Session
    resampler: Session
    media_kv: Session
    decoder: Session

    @classmethod
    def open(cls, bundle: Path, manifest: Manifest, backend: Backend, options: SessionOptions) -> Engines:
        """Opens all of them. Raises BackendError or BundleError; what was opened before is closed."""
        opened: dict[str, Session] = {}
        try:
            for name in ("vision_encoder", "resampler", "media_kv", "decoder"):
                opened[name] = backend.open(bundle, manifest, manifest.graph(name), options)
        except BaseException:
            for session in opened.values():
                session.close()
            raise
        return cls(**opened)

    def close(self) -> None:
        """Frees the sessions."""
        for session in (self.vision_encoder, self.resampler, self.media_kv, self.decoder):
            session.close()
