"""Tokenizers of checkpoints. The ids in data/tiny_bpe.json are those that the sentencepiece library (0.2.3) gives with tiny_bpe.model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from flamingo_reference.checkpoints.files.sentencepiece_model import read_sentencepiece
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.files.tokenizer_file import added_ids, open_tokenizer

DATA = Path(__file__).parent / "data"
ADDED = ("<|endofchunk|>", "<image>", "<PAD>")


@pytest.mark.parametrize("case", json.loads((DATA / "tiny_bpe.json").read_text()), ids=lambda case: case["text"][:12])
def test_sentencepieces_own_ids(case: dict[str, object]) -> None:
    tokenizer = read_sentencepiece(DATA / "tiny_bpe.model")
    assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]


def test_pieces_that_carry_structure() -> None:
    tokenizer = read_sentencepiece(DATA / "tiny_bpe.model")
    assert added_ids(tokenizer) == {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3}
    ids = tokenizer.encode("<s>A<image>two</s>", add_special_tokens=False).ids
    assert (ids[0], ids[-1], ids.count(3)) == (1, 2, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("A")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "unigram", "huge number"])
def test_files_that_are_none(tmp_path: Path, damage: str) -> None:
    data = (DATA / "tiny_bpe.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        {
            "cut": data[:-7],
            "text": b"hello there",
            "empty": b"",
            "unigram": b"\x0a\x03\x0a\x01a" + b"\x12\x02\x18\x01",
            "huge number": b"\x0a" + b"\xff" * 20,
        }[damage]
    )
    named = "kind unigram, expected byte-pair" if damage == "unigram" else "is not a SentencePiece model"
    with pytest.raises(CheckpointError, match=named):
        read_sentencepiece(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokens_that_training_added_follow_in_order(folder: Path) -> None:
    tokenizer = open_tokenizer(folder / "tokenizer.json", ADDED)
    assert added_ids(tokenizer) == {"<|endoftext|>": 256, "<|endofchunk|>": 257, "<image>": 258, "<PAD>": 259}
    assert tokenizer.encode("a<image><|endofchunk|>").ids[1:] == [258, 257]


def test_a_padding_token_of_its_own_is_kept(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    assert "<PAD>" not in added_ids(open_tokenizer(folder / "tokenizer.json", ADDED))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": None}))
    assert added_ids(open_tokenizer(folder / "tokenizer.json", ADDED))["<PAD>"] == 259


def test_tokens_that_are_there_keep_their_ids(folder: Path) -> None:
    tokenizer = open_tokenizer(folder / "tokenizer.json", ["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    again = open_tokenizer(folder / "tokenizer.json", ADDED)
    assert added_ids(again) == {"<|endoftext|>": 256, "<image>": 257, "<|endofchunk|>": 258, "<PAD>": 259}


def test_added_tokens_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    shutil.copy(DATA / "tiny_bpe.model", tmp_path / "tokenizer.model")
    size = read_sentencepiece(DATA / "tiny_bpe.model").get_vocab_size()
    added = {"<fake_token_around_image>": size, "<end_of_utterance>": size + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    found = added_ids(open_tokenizer(tmp_path / "tokenizer.model"))
    assert {tag: found[tag] for tag in added} == added
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": size + 5}))
    with pytest.raises(CheckpointError, match=f"gives <x> the id {size + 5}, but after tokenizer.model it has {size}"):
        open_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": "1"}))
    with pytest.raises(CheckpointError, match="is malformed"):
        open_tokenizer(tmp_path / "tokenizer.model")


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        open_tokenizer(tmp_path / "tokenizer.json")
