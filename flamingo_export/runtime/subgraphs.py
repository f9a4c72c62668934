"""The opened subgraphs of a bundle: one session each, the decoder's parts as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flamingo_export.backends.base import Backend, Session, SessionOptions
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.runtime.decoder_parts import DecoderParts


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
        graphs = [manifest.graph(name) for name in ("vision_encoder", "resampler", "media_kv")]
        graphs += [graph for graph, _ in manifest.decoder_graphs()]
        opened: list[Session] = []
        devices = backend.placement(bundle, manifest, options)
        try:
            for graph in graphs:
                opened.append(backend.open(bundle, manifest, graph, options.on(devices[graph.name])))
            vision_encoder, resampler, media_kv, *parts = opened
            return cls(
                vision_encoder=vision_encoder,
                resampler=resampler,
                media_kv=media_kv,
                decoder=parts[0] if len(parts) == 1 else DecoderParts(parts),
            )
        except BaseException:
            for session in opened:
                session.close()
            raise

    def close(self) -> None:
        """Frees the sessions."""
        for session in (self.vision_encoder, self.resampler, self.media_kv, self.decoder):
            session.close()
