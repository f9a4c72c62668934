"""The tokenizer a bundle carries: the model's own, checked against its vocabulary, or a stand-in for random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_export.errors import CheckpointError
from flamingo_reference.checkpoints.files.tensors import CheckpointError as UnreadableCheckpoint
from flamingo_reference.checkpoints.files.tokenizer_file import open_tokenizer
from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import TextConfig
from flamingo_reference.input_format import PAPER, Tags

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_STRUCTURE = {"pad": "<PAD>", "bos": "<BOS>", "eoc": "<EOC>", "image": "<image>"}
_NUM_BYTES = 256
_MAX_SPARE_ROWS = 255  # of an embedding, without a token


def checked_tokenizer(path: Path, config: ModelConfig, tags: Tags = PAPER.tags) -> str:
    """The text of a tokenizer.json that fits the model, made of a SentencePiece model where `path` is one.

    tags: the texts of the tokens that carry structure, and those that are added where the file lacks them.
    Raises CheckpointError if it cannot be read, or is of another vocabulary: of another size, or with other ids for the tags.
    """
    advice = "Bring the tokenizer that the model was trained with."
    try:
        tokenizer = open_tokenizer(path, tags.added)
    except UnreadableCheckpoint as error:
        raise CheckpointError(str(error)) from error
    size, expected = tokenizer.get_vocab_size(with_added_tokens=True), config.language_model.embedding_rows
    # Others pad their embeddings to a round number of rows.
    spare = 0 if tags == PAPER.tags else _MAX_SPARE_ROWS
    if not expected - spare <= size <= expected:
        raise CheckpointError(f"{path} has {size} tokens, the model's vocabulary has {expected}. {advice}")
    _check_ids(tokenizer, path, expected, advice)
    wanted = {
        tag: getattr(config.tokens, field)
        for field, tag in (("bos", tags.bos), ("eoc", tags.eoc), ("image", tags.image))
        if tag
    }
    faults = [
        f"{tag} is {tokenizer.token_to_id(tag)}, expected {index}"
        for tag, index in wanted.items()
        if tokenizer.token_to_id(tag) != index
    ]
    if faults:
        raise CheckpointError(f"{path} is of another vocabulary than the model: {'; '.join(faults)}. {advice}")
    return path.read_text(encoding="utf-8") if path.suffix == ".json" and not tags.added else str(tokenizer.to_str())


def checked_text_tokenizer(path: Path, text: TextConfig) -> str:
    """The text of a tokenizer.json that fits a text tower. Raises CheckpointError if it cannot be read or is of another vocabulary."""
    advice = "Bring the tokenizer that the text tower was trained with."
    try:
        tokenizer = open_tokenizer(path)
    except UnreadableCheckpoint as error:
        raise CheckpointError(str(error)) from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if not text.vocab_size - _MAX_SPARE_ROWS <= size <= text.vocab_size:
        raise CheckpointError(f"{path} has {size} tokens, the text tower's vocabulary has {text.vocab_size}. {advice}")
    _check_ids(tokenizer, path, text.vocab_size, advice)
    return str(tokenizer.to_str())


def _check_ids(tokenizer: Tokenizer, path: Path, rows: int, advice: str) -> None:
    """Raises CheckpointError for an id beyond the vocabulary: there is nothing to embed for it, and the library, which writes a place for
    every id up to the largest, ends the process where that takes more than all memory."""
    text, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1))
    if largest >= rows:
        raise CheckpointError(f"{path} gives {text} the id {largest}, the model has {rows} tokens. {advice}")


def placeholder_tokenizer(config: ModelConfig) -> str | None:
    """A byte-level tokenizer.json of the model's size without merges, for weights that were never trained: any text can be encoded.

    Structural tokens stand at the config's ids, places that are left hold `<unused_i>`. None if the vocabulary has no room for the bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    size = config.language_model.embedding_rows
    special = {getattr(config.tokens, field): tag for field, tag in _STRUCTURE.items()}
    if size < _NUM_BYTES + len(special):
        return None
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {special.get(index) or next(letters, f"<unused_{index}>"): index for index in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in special.values()])
    return tokenizer.to_str(pretty=False)
