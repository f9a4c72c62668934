"""SentencePiece's `tokenizer.model` as a `tokenizers` tokenizer, without the sentencepiece library.

The file is a protocol buffer of few fields, read here as the format says (google/sentencepiece, sentencepiece_model.proto). Only byte-pair
models are known, which is what LLaMA and the models made from it have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flamingo_reference.checkpoints.files.tensors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""Stands for a space in pieces."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2
_MAX_BYTES = 50_000_000


class _Piece(msgspec.Struct, frozen=True):
    text: str
    score: float
    kind: int


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.model`; pieces that carry structure (`<s>`, `</s>`, `<unk>`) are special tokens of the same ids.

    As the tokenizers that were published for LLaMA, it puts a space before each stretch of text between such tokens where the model asks for
    one before a text. Raises CheckpointError if the file is malformed or of another kind than byte-pair encoding.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_BYTES}: it is not a tokenizer.")
    try:
        pieces, trainer, normalizer = _parsed(path.read_bytes())
    except (ValueError, IndexError, TypeError, KeyError, struct.error) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model ({error}). Fetch it again.") from error
    kind = trainer.get(3, 1)
    if kind != _BPE or trainer.get(24, 0):
        names = {1: "unigram", 3: "word", 4: "char"}
        found = "byte-pair with spaces as suffixes" if kind == _BPE else names.get(kind, str(kind))
        raise CheckpointError(
            f"{path} is a SentencePiece model of kind {found}, expected byte-pair. Bring the model's tokenizer.json."
        )
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise CheckpointError(f"{path} has pieces that stand for the same text. Fetch it again.")
    try:
        return _tokenizer(pieces, vocabulary, normalizer)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} makes no tokenizer ({error}). Fetch it again.") from error


def _tokenizer(pieces: list[_Piece], vocabulary: Mapping[str, int], normalizer: Mapping[int, Any]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    has_bytes = any(piece.kind == _BYTE for piece in pieces)
    model = models.BPE(
        vocab=dict(vocabulary), merges=_merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if normalizer.get(2):
        steps.append(normalizers.Precompiled(_text(normalizer[2])))
    if normalizer.get(4, 1):  # runs of spaces become one
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    prefixed = bool(normalizer.get(3, 1))
    if prefixed:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    plain = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def _merges(pieces: list[_Piece], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs to join, the best first: SentencePiece joins the neighbours whose union scores highest."""
    found = []
    for piece in pieces:
        if piece.kind != _NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = vocabulary.get(piece.text[:cut]), vocabulary.get(piece.text[cut:])
            if left is not None and right is not None and pieces[left].kind == pieces[right].kind == _NORMAL:
                found.append((-piece.score, left, right))
    return [(pieces[left].text, pieces[right].text) for _, left, right in sorted(found)]


def _parsed(data: bytes) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    """Pieces, and the settings of trainer and normalizer by field number."""
    pieces: list[_Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(value))
            (score,) = struct.unpack("<f", entry.get(2, b"\0\0\0\0"))
            pieces.append(_Piece(_text(entry.get(1)).decode(), score, int(entry.get(3, _NORMAL))))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, trainer, normalizer


def _text(value: Any) -> bytes:
    if not isinstance(value, bytes):  # a number would be taken for a length
        raise ValueError(f"{type(value).__name__} in place of a text")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer message: number, and an integer or the bytes. Raises ValueError if it is cut short."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if place + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 64 bits")
