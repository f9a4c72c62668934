"""Checkpoints, their tokenizers and adapters that are not what they should be: every number of those that open is read as well."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from flamingo_export.bundle.bundled_tokenizer import checked_tokenizer
from flamingo_export.cli import main
from flamingo_export.sources.checkpoint import CheckpointSource
from flamingo_export.sources.choice import CheckpointFolder

from mutations import fuzz, mutated, mutated_json, mutated_json_text, mutated_safetensors, mutated_zip  # isort: skip

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from tests.fuzz.conftest import Copy

IDEFICS, OPENFLAMINGO = "idefics-tiny", "openflamingo-tiny"
NATIVE_FILES = ("config.json", "model.safetensors", "tokenizer/tokenizer.json")
IDEFICS_FILES = ("config.json", "model.safetensors.index.json", "model-00002-of-00005.safetensors", "tokenizer.json")
OPENFLAMINGO_FILES = (
    "checkpoint.pt",
    "mpt/config.json",
    "mpt/model.safetensors",
    "mpt/tokenizer.json",
    "clip/config.json",
    "clip/model.safetensors",
)


def changed(name: str, whole: bytes, rng: random.Random) -> bytes:
    if name.endswith(".safetensors"):
        return mutated_safetensors(whole, rng)
    if name.endswith(".pt"):
        return mutated_zip(whole, rng)
    return mutated_json_text(json.loads(whole), rng)


def read(files: CheckpointFolder | Path) -> None:
    """What a build reads: configuration, every tensor, the tokenizer."""
    source = CheckpointSource(files)
    for name in source.names():
        assert source.read(name).shape == source.shape(name)
    if source.tokenizer is not None:
        checked_tokenizer(source.tokenizer, source.config, source.inputs.tags)


def openflamingo(folder: Path, **given: Any) -> CheckpointFolder:
    return CheckpointFolder(
        path=folder / "checkpoint.pt", language_model=folder / "mpt", vision_encoder=folder / "clip", **given
    )


@pytest.mark.parametrize("name", NATIVE_FILES)
def test_our_own_format(native: Path, tmp_path: Path, with_file: Copy, name: str) -> None:
    whole = (native / name).read_bytes()

    def case(rng: random.Random) -> None:
        read(with_file(native, tmp_path / "c", name, changed(name, whole, rng)))

    fuzz(f"native {name}", 50, case)


@pytest.mark.parametrize("name", IDEFICS_FILES)
def test_idefics(published: Path, tmp_path: Path, with_file: Copy, name: str) -> None:
    folder = published / IDEFICS
    whole = (folder / name).read_bytes()

    def case(rng: random.Random) -> None:
        read(with_file(folder, tmp_path / "c", name, changed(name, whole, rng)))

    fuzz(f"idefics {name}", 50, case)


@pytest.mark.parametrize("name", OPENFLAMINGO_FILES)
def test_openflamingo(published: Path, tmp_path: Path, with_file: Copy, name: str) -> None:
    folder = published / OPENFLAMINGO
    whole = (folder / name).read_bytes()

    def case(rng: random.Random) -> None:
        read(openflamingo(with_file(folder, tmp_path / "c", name, changed(name, whole, rng))))

    fuzz(f"openflamingo {name}", 50, case, answers=not name.endswith("clip/config.json"))


@pytest.mark.parametrize("family", ["native", IDEFICS, OPENFLAMINGO])
def test_inspect_and_plan(
    native: Path, published: Path, tmp_path: Path, with_file: Copy, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder = native if family == "native" else published / family
    name = "mpt/config.json" if family == OPENFLAMINGO else "config.json"
    whole = json.loads((folder / name).read_bytes())

    def case(rng: random.Random) -> None:
        copy = with_file(folder, tmp_path / "c", name, json.dumps(mutated_json(whole, rng)).encode())
        parts = ["--lm", copy / "mpt", "--vision", copy / "clip"] if family == OPENFLAMINGO else []
        path = copy / "checkpoint.pt" if family == OPENFLAMINGO else copy
        line = rng.choice((["inspect", path], ["build", "--checkpoint", path, *parts, "--out", tmp_path / "out", "--plan"]))
        code = main([str(word) for word in line])
        printed = capsys.readouterr()
        assert code in (0, 1)
        assert "This is a bug" not in printed.err, (line[0], printed.err)

    fuzz(f"inspect and plan {family}", 12, case, refusals=False)


# Adapters.


@pytest.fixture(scope="module")
def adapter(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of IDEFICS with a module saved whole, in the layout of PEFT's files."""
    folder = tmp_path_factory.mktemp("adapter")
    rng = np.random.default_rng(0)
    module = "model.layers.1.self_attn.q_proj"
    tensors = {
        f"base_model.model.{module}.lora_A.weight": rng.standard_normal((4, 64)).astype(np.float32),
        f"base_model.model.{module}.lora_B.weight": rng.standard_normal((64, 4)).astype(np.float32),
        "base_model.model.model.norm.weight": rng.standard_normal(64).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm"],
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"self_attn.q_proj": 5},
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "layers_to_transform": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    read(CheckpointFolder(path=published / IDEFICS, adapters=(folder,)))
    return folder


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(published: Path, adapter: Path, tmp_path: Path, with_file: Copy, name: str) -> None:
    whole = (adapter / name).read_bytes()

    def case(rng: random.Random) -> None:
        copy = with_file(adapter, tmp_path / "a", name, changed(name, whole, rng))
        read(CheckpointFolder(path=published / IDEFICS, adapters=(copy,)))

    fuzz(f"adapter {name}", 60, case)


# SentencePiece.


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(*fields: tuple[int, int | float | bytes | str]) -> bytes:
    """A protocol buffer of these fields (google/sentencepiece, sentencepiece_model.proto)."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def sentencepiece() -> bytes:
    """A byte-pair model of 300 pieces."""
    kinds = {0: ("<unk>", 2), 1: ("<s>", 3), 2: ("</s>", 3)}
    pieces = [kinds.get(index, (f"<0x{index - 3:02X}>", 6)) for index in range(259)]
    pieces += [(piece, 1) for piece in ("\u2581", "a", "b", "c", "ab", "abc", "\u2581a", *(chr(0x400 + i) for i in range(34)))]
    body = [(1, message((1, text), (2, -float(index)), (3, kind))) for index, (text, kind) in enumerate(pieces)]
    return message(*body, (2, message((3, 2), (4, len(pieces)))), (3, message((3, 1), (4, 0))))


def test_sentencepiece_models(published: Path, tmp_path: Path, with_file: Copy) -> None:
    folder, whole = published / IDEFICS, sentencepiece()

    def case(rng: random.Random) -> None:
        copy = with_file(folder, tmp_path / "c", "tokenizer.json", b"")
        (copy / "tokenizer.json").unlink()
        first = rng.random() < 0.8
        (copy / "tokenizer.model").write_bytes(mutated(whole, rng) if first else whole)
        added = {"<fake_token_around_image>": 300, "<image>": 301}
        (copy / "added_tokens.json").write_bytes(json.dumps(added).encode() if first else mutated_json_text(added, rng))
        source = CheckpointSource(copy)
        assert source.tokenizer is not None
        checked_tokenizer(source.tokenizer, source.config, source.inputs.tags)

    fuzz("sentencepiece", 120, case)
