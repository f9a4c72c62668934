"""A Git LFS pointer or a web page in a file's place is named as that, wherever a checkpoint's files are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flamingo_reference.checkpoints.files.chat_template_files import read_chat_template
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.files.tokenizer_file import open_tokenizer
from flamingo_reference.checkpoints.loading import CheckpointFiles, load

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"
PAGES = [
    b"<!DOCTYPE html>\n<html class=''>\n<head><title>Log in</title>",
    b"\xef\xbb\xbf \n<HTML lang=en>",
    b"\n\n<!doctype HTML>",
]
CASES = [
    (POINTER, "is a Git LFS pointer, .* not fetched. Run `git lfs pull`"),
    *((page, "is an HTML page, .*gated") for page in PAGES),
]


@pytest.mark.parametrize(("content", "said"), CASES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "checkpoint.pt", "open_clip_pytorch_model.bin"])
def test_weights(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=said):
            open_tensors(path)


@pytest.mark.parametrize(("content", "said"), CASES[:2])
def test_shards_and_their_index(tmp_path: Path, content: bytes, said: str) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=said):
        open_tensors(tmp_path)
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        open_tensors(tmp_path)


@pytest.mark.parametrize(("content", "said"), CASES)
def test_json_and_tokenizers(tmp_path: Path, content: bytes, said: str) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            (read_json if name == "config.json" else open_tokenizer)(tmp_path / name)


@pytest.mark.parametrize(("content", "said"), CASES)
@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_chat_templates(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """As a template it would be the same text for every conversation."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_chat_template(tmp_path)


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    from flamingo_export.sources.choice import nano_checkpoint

    shutil.copytree(nano_checkpoint(), tmp_path / "nano")
    (tmp_path / "nano" / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a Git LFS pointer"):
        load(CheckpointFiles(path=tmp_path / "nano"))
