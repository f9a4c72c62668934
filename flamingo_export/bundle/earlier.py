"""What bundles of earlier versions do not say, read from what they hold."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.bundle.manifest import Manifest

TOKENIZER_FILE = Path("tokenizer") / "tokenizer.json"


class _Added(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_Added] = []


def completed(bundle: Path, manifest: Manifest) -> Manifest:
    """The manifest as today's build would write it.

    0.1.0 banned `<image>` only. In a model that was trained with a tag around every image, that tag is banned too. Engines whose
    candidates do not leave it out are then asked for the logits of the whole vocabulary. Golden values hold for the manifest as it is.
    """
    tag, tokens = manifest.inputs.tags.around_image, manifest.config.tokens
    path = bundle / TOKENIZER_FILE
    if tag is None or tokens.banned or not path.is_file():
        return manifest
    try:
        added = msgspec.json.decode(path.read_bytes(), type=_Tokenizer).added_tokens
    except (msgspec.MsgspecError, OSError):  # said where the tokenizer is opened
        return manifest
    size = manifest.config.language_model.vocab_size
    found = {each.id for each in added if each.content == tag and 0 <= each.id < size} - {*tokens.stops, tokens.image}
    if not found:
        return manifest
    tokens = msgspec.structs.replace(tokens, banned=tuple(sorted(found)))
    return msgspec.structs.replace(manifest, config=msgspec.structs.replace(manifest.config, tokens=tokens))


def lacking(bundle: Path, manifest: Manifest) -> tuple[str, ...]:
    """A sentence for each thing that a build of today would record and this bundle does not; none where it has all.

    Such a bundle opens and gives its answers all the same. Whatever comes into the manifest with a default that means "not recorded" gets
    its sentence here.
    """
    today = completed(bundle, manifest).config.tokens
    if today == manifest.config.tokens:
        return ()
    tag = manifest.inputs.tags.around_image
    found = [f"{tag} is not recorded as never generated; it is looked up in the tokenizer whenever the bundle is opened"]
    if any(engine.banned is None for engine in manifest.engines):
        found.append(
            f"its engines leave out <image> and not {tag}: the whole vocabulary's logits are read at each step, which is slower"
        )
    return tuple(found)
