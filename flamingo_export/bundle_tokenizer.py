"""The tokenizer a bundle carries: the model's own, checked against its vocabulary, or a stand-in for random weights."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.errors import CheckpointError
from flamingo_reference.config import ModelConfig


def checked_tokenizer(path: Path, config: ModelConfig) -> str:
    """The text of a tokenizer.json that fits the model.

    Raises CheckpointError if it cannot be read, or its size is not the model's vocabulary.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer.json: {error}") from error
    size, expected = tokenizer.get_vocab_size(), config.language_model.vocab_size
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} tokens, the model's vocabulary has {expected}. Bring the tokenizer the model was trained with."
        )
    return tokenizer.to_str(pretty=False)


def placeholder_tokenizer(config: ModelConfig) -> str:
    """A byte-level tokenizer.json of the model's size without merges, for weights that were never trained: any text can be encoded.

    Structural tokens stand at the config's ids, unused places hold `<unused_i>`. Raises CheckpointError below 260 tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    size = config.language_model.vocab_size
    special = {
        config.tokens.pad: "<PAD>",
        config.tokens.bos: "<BOS>",
        config.tokens.eoc: "<EOC>",
        config.tokens.image: "<image>",
    }
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary: dict[str, int] = {}
    for index in range(size):
        vocabulary[special.get(index) or next(letters, f"<unused_{index}>")] = index
    if next(letters, None) is not None:
        raise CheckpointError(f"a vocabulary of {size} tokens has no room for the 256 bytes and 4 structural tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    return tokenizer.to_str(pretty=False)
