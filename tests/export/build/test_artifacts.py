"""Opening a bundle: what was altered is found and named, what is known is not read again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flamingo_export import api
from flamingo_export.bundle import verify as artifacts
from flamingo_export.bundle.manifest import FileRecord, Manifest, read_manifest, write_manifest
from flamingo_export.bundle.verify import open_bundle, verify
from flamingo_export.errors import BundleError
from flamingo_export.sources.choice import RandomWeights
from flamingo_reference.config import ModelConfig


@pytest.fixture
def bundle(spoken_config: ModelConfig, tmp_path: Path) -> Path:
    return api.build(RandomWeights(config=spoken_config), out=tmp_path / "b.bundle", parity="skip").path


def rewritten(bundle: Path, change: Callable[[Manifest], Manifest]) -> None:
    write_manifest(bundle, change(read_manifest(bundle)))


def test_digests_are_computed_once(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    first = verify(bundle, manifest)
    assert set(first.computed) == {record.path for record in manifest.files}
    second = verify(bundle, manifest)
    assert not second.computed
    assert set(second.known) == set(first.computed)


def test_a_touched_file_is_computed_again(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    verify(bundle, manifest)
    os.utime(bundle / "decoder.onnx", (1, 1))
    assert verify(bundle, manifest).computed == ("decoder.onnx",)


def test_a_byte_altered_behind_the_files_time_is_found(bundle: Path) -> None:
    """Size and time of modification put back: the inode's change time still tells."""
    path = bundle / "weights" / "resampler.safetensors"
    open_bundle(bundle)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(BundleError, match=r"weights/resampler\.safetensors was altered.*Build it again, or copy it again"):
            open_bundle(bundle)


def test_all_damage_is_named_at_once(bundle: Path) -> None:
    (bundle / "media_kv.onnx").unlink()
    os.truncate(bundle / "weights" / "vision_encoder.safetensors", 100)
    (bundle / "resampler.onnx").unlink()
    (bundle / "resampler.onnx").symlink_to(bundle.parent / "elsewhere.onnx")
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert "media_kv.onnx is missing" in message
    assert "weights/vision_encoder.safetensors has 100 bytes, expected" in message
    assert f"resampler.onnx is a link to {bundle.parent / 'elsewhere.onnx'}, which is not there" in message


@pytest.mark.parametrize("name", ["decoder.onnx", "weights/resampler.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a Git LFS pointer, .*git lfs pull"),
        ("<!DOCTYPE html>\n<title>Log in</title>", "is an HTML page, .*gated"),
    ],
)
def test_what_was_downloaded_in_a_files_place_is_named(bundle: Path, name: str, content: str, said: str) -> None:
    (bundle / name).write_text(content)
    with pytest.raises(BundleError, match=rf"{name.removeprefix('weights/')}.* {said}"):
        open_bundle(bundle)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "weights/../../secret", "", "manifest.json", "..\\secret"])
def test_paths_that_leave_the_bundle_are_refused(path: str, bundle: Path) -> None:
    (bundle.parent / "secret").write_text("s")
    record = FileRecord(path=path, size=1, sha256="0" * 64)
    rewritten(bundle, lambda manifest: msgspec.structs.replace(manifest, files=(*manifest.files, record)))
    with pytest.raises(BundleError, match="does not name a file of the bundle"):
        open_bundle(bundle)


def test_a_linked_folder_inside_is_verified_like_any_other(bundle: Path) -> None:
    (bundle / "weights").rename(bundle.parent / "weights")
    (bundle / "weights").symlink_to(bundle.parent / "weights")
    open_bundle(bundle)
    (bundle.parent / "weights" / "more.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights/more\.safetensors is not among the files"):
        open_bundle(bundle)


def test_what_a_link_leads_to_is_verified_and_verified_again_when_it_changes(bundle: Path) -> None:
    path, target = bundle / "weights" / "resampler.safetensors", bundle.parent / "blob"
    path.rename(target)
    path.symlink_to(target)
    manifest = read_manifest(bundle)
    verify(bundle, manifest)
    assert not verify(bundle, manifest).computed
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights/resampler\.safetensors was altered"):
        open_bundle(bundle)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"weights/resampler\.safetensors is not a file"):
        open_bundle(bundle)


def test_a_bundle_reached_through_a_link_opens(bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    assert open_bundle(link) == open_bundle(bundle)
    assert not verify(link, read_manifest(link)).computed


def test_a_read_only_bundle_and_no_place_for_notes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.parent / "file").write_text("")
    monkeypatch.setattr(artifacts, "cache_folder", lambda: bundle.parent / "file" / "cache")
    before = sorted(bundle.rglob("*"))
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    manifest = read_manifest(bundle)
    for _ in range(2):
        assert len(verify(bundle, manifest).computed) == len(manifest.files)
    assert sorted(bundle.rglob("*")) == before


def test_damaged_notes_are_no_harm(bundle: Path, tmp_path: Path) -> None:
    open_bundle(bundle)
    (notes,) = (tmp_path / "cache").iterdir()
    notes.write_text("{")
    assert len(verify(bundle, read_manifest(bundle)).computed) == len(read_manifest(bundle).files)


def test_a_newer_schema_and_a_half_manifest(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(BundleError, match=r"schema 99.*Upgrade"):
        open_bundle(bundle)
    (bundle / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match="malformed"):
        open_bundle(bundle)
    (bundle / "manifest.json").unlink()
    with pytest.raises(BundleError, match="not a complete bundle"):
        open_bundle(bundle)
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(bundle.parent / "none.bundle")


@pytest.mark.parametrize("file", ["/tmp/decoder.onnx", "../decoder.onnx", "decoder-2.onnx"])
def test_a_graph_that_is_not_listed_is_not_run(file: str, bundle: Path) -> None:
    """A manifest may not send the runtime to a file whose digest nobody knows."""

    def elsewhere(manifest: Manifest) -> Manifest:
        graphs = tuple(
            msgspec.structs.replace(graph, file=file) if graph.name == "decoder" else graph for graph in manifest.graphs
        )
        return msgspec.structs.replace(manifest, graphs=graphs)

    rewritten(bundle, elsewhere)
    with pytest.raises(BundleError, match=r"graph decoder is .*expected a file that the manifest lists"):
        open_bundle(bundle)


def test_weights_and_tokenizers_that_are_not_listed_are_refused(bundle: Path) -> None:
    rewritten(
        bundle,
        lambda manifest: msgspec.structs.replace(
            manifest, files=tuple(record for record in manifest.files if record.path.endswith(".onnx"))
        ),
    )
    with pytest.raises(BundleError, match=r"tokenizer/tokenizer\.json is not among.*weights/decoder"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk": 0}, r"limits\.chunk is 0"),
        ({"bank_rows": -1}, r"limits\.bank_rows is -1"),
        ({"max_length": 4, "chunk": 8}, r"limits\.chunk is 8, more than max_length 4"),
    ],
)
def test_limits_that_cannot_be(change: dict[str, int], words: str, bundle: Path) -> None:
    rewritten(
        bundle, lambda manifest: msgspec.structs.replace(manifest, limits=msgspec.structs.replace(manifest.limits, **change))
    )
    with pytest.raises(BundleError, match=words):
        open_bundle(bundle)


def test_a_configuration_that_cannot_be(bundle: Path) -> None:
    def headless(manifest: Manifest) -> Manifest:
        lm = msgspec.structs.replace(manifest.config.language_model, num_heads=0)
        return msgspec.structs.replace(manifest, config=msgspec.structs.replace(manifest.config, language_model=lm))

    rewritten(bundle, headless)
    with pytest.raises(BundleError, match=r"is invalid: .*num_heads"):
        open_bundle(bundle)
