"""The tokenizer a bundle carries: the model's own, checked against its vocabulary, or a stand-in for random weights."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.errors import CheckpointError
from flamingo_reference.config import ModelConfig

_STRUCTURE = {"pad": "<PAD>", "bos": "<BOS>", "eoc": "<EOC>", "image": "<image>"}
_NUM_BYTES = 256


def checked_tokenizer(path: Path, config: ModelConfig) -> str:
    """The text of a tokenizer.json that fits the model.

    Raises CheckpointError if it cannot be read, or is of another vocabulary: of another size, or with other ids for the tags.
    """
    from tokenizers import Tokenizer

    advice = "Bring the tokenizer that the model was trained with."
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer.json ({error}). {advice}") from error
    size, expected = tokenizer.get_vocab_size(with_added_tokens=True), config.language_model.vocab_size
    if size != expected:
        raise CheckpointError(f"{path} has {size} tokens, the model's vocabulary has {expected}. {advice}")
    wanted = {tag: getattr(config.tokens, field) for field, tag in _STRUCTURE.items() if field != "pad"}
    faults = [
        f"{tag} is {tokenizer.token_to_id(tag)}, expected {index}"
        for tag, index in wanted.items()
        if tokenizer.token_to_id(tag) != index
    ]
    if faults:
        raise CheckpointError(f"{path} is of another vocabulary than the model: {'; '.join(faults)}. {advice}")
    return text


def placeholder_tokenizer(config: ModelConfig) -> str | None:
    """A byte-level tokenizer.json of the model's size without merges, for weights that were never trained: any text can be encoded.

    Structural tokens stand at the config's ids, places that are left hold `<unused_i>`. None if the vocabulary has no room for the bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    size = config.language_model.vocab_size
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
