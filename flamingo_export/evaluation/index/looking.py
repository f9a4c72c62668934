"""Looking into an index by an image or a text, with the encoder of the bundle that made it; the decoder is not opened."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from flamingo_export.backends.base import SessionOptions
from flamingo_export.bundle.identity import bundle_digest
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.index.encoder import EMBEDDINGS, Encoder
from flamingo_export.evaluation.index.exact_search import nearest
from flamingo_export.evaluation.index.store import Index, IndexedItem
from flamingo_export.evaluation.protocol import Features
from flamingo_export.runtime.media import MediumSource

Hits = list[tuple[IndexedItem, float]]
"""Items with their cosine, the most similar first."""


def found_by_image(bundle: Path, folder: Path, image: MediumSource, count: int, *, faiss: bool = False, **options: Any) -> Hits:
    """Items of an index that look most like a medium. options: backend, device, threads and fallback as `flamingo_export.load` takes them.

    Raises EvaluationError if the index is of another bundle or damaged, ImageError, BundleError, BackendError.
    """
    from flamingo_export.backends.registry import get_backend
    from flamingo_export.bundle.verify import open_bundle

    manifest, index = open_bundle(bundle), Index(folder)
    index.check_bundle(bundle_digest(manifest), bundle.name)
    backend = get_backend(options.get("backend", "auto"), manifest)
    encoder = Encoder(bundle, manifest, backend, SessionOptions(threads=options.get("threads", 0)))
    try:
        return _hits(index, encoder.encode([image]), count, faiss)
    finally:
        encoder.close()


def found_by_text(bundle: Path, folder: Path, text: str, count: int, *, faiss: bool = False, **options: Any) -> Hits:
    """Items of an index that a text says most of. options: as `found_by_image` takes them.

    Raises EvaluationError as well if the index holds features that texts cannot be compared with, InputError if the bundle has no text tower.
    """
    from flamingo_export import api

    index = Index(folder)
    with api.load_encoder(bundle, **options) as encoder:
        manifest: Manifest = encoder.manifest
        index.check_bundle(bundle_digest(manifest), bundle.name)
        if index.record.features != EMBEDDINGS:
            raise EvaluationError(
                f"the index {folder} holds {index.record.features}, which texts cannot be compared with. Make it again: "
                f"flamingo-export index {shlex.quote(str(bundle))} --data ... --out {shlex.quote(str(folder))} --overwrite"
            )
        return _hits(index, encoder.embed_texts([text]), count, faiss)


def _hits(index: Index, queries: Features, count: int, faiss: bool) -> Hits:
    if faiss:
        from flamingo_export.evaluation.index.with_faiss import FaissIndex

        rows, cosines = FaissIndex(index).nearest(queries, count)
    else:
        rows, cosines = nearest(index, queries, min(count, index.record.count))
    items = index.items()
    return [(items[row], float(cosine)) for row, cosine in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)]
