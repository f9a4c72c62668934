"""A checkpoint's tokenizer: its tokenizer.json, or one made of SentencePiece's tokenizer.model, with the tokens its family added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flamingo_reference.checkpoints.files.failed_downloads import refuse_stand_in
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.sentencepiece_model import read_sentencepiece
from flamingo_reference.checkpoints.files.tensors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = ("tokenizer/tokenizer.json", "tokenizer.json", "tokenizer.model")
"""Where a folder's tokenizer is looked for, in this order."""
PAD = "<PAD>"
_MAX_BYTES = 100_000_000


def open_tokenizer(path: Path, added: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or a tokenizer.model with the added_tokens.json beside it.

    added: tokens that training put behind the vocabulary, in order; those that are there keep their ids, `<PAD>` is left out where
    tokenizer_config.json names another. Raises CheckpointError if a file cannot be read or ids do not follow each other.
    """
    from tokenizers import AddedToken

    refuse_stand_in(path)
    tokenizer = _with_added_file(path, read_sentencepiece(path)) if path.suffix == ".model" else _read_json_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    padded = _pads(path.parent)
    wanted = [tag for tag in added if not (tag == PAD and padded) and tokenizer.token_to_id(tag) is None]
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in wanted])
    return tokenizer


def added_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens added to the vocabulary, which carry structure, by their text."""
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}


def _read_json_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    advice = "Bring the tokenizer that the model was trained with."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_BYTES}. {advice}")
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer.json ({error}). {advice}") from error


def _with_added_file(path: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Adds what added_tokens.json says, each at the id that it names."""
    from tokenizers import AddedToken

    beside = path.with_name("added_tokens.json")
    if not beside.is_file():
        return tokenizer
    ids: Mapping[str, Any] = read_json(beside)
    if not all(type(index) is int for index in ids.values()):
        raise CheckpointError(f"{beside} is malformed: expected an object of tokens to ids. Fetch it again.")
    for tag, index in sorted(ids.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False)])
        if tokenizer.token_to_id(tag) != index:
            raise CheckpointError(
                f"{beside} gives {tag} the id {index}, but after {path.name} it has {tokenizer.token_to_id(tag)}. "
                "Bring both files of one model."
            )
    return tokenizer


def _pads(folder: Path) -> bool:
    """Whether the tokenizer has a padding token of its own."""
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and read_json(settings).get("pad_token") is not None
