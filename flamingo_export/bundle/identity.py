"""What a bundle is known by in results: one digest of all its files, and its precision in a word."""

from __future__ import annotations

import hashlib

from flamingo_export.bundle.manifest import Manifest


def bundle_digest(manifest: Manifest) -> str:
    """SHA-256, in hexadecimal, of the paths and digests of all files."""
    digest = hashlib.sha256()
    for record in sorted(manifest.files, key=lambda record: record.path):
        digest.update(f"{record.path}\0{record.sha256}\n".encode())
    return digest.hexdigest()


def precision_of(manifest: Manifest) -> str:
    """The storage type, or the policy's name where matrices are quantised."""
    policy = manifest.precision.policy
    return policy.name if policy is not None else str(manifest.precision.storage)
