"""Text to token ids and back, by the bundle's `tokenizer/tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo_export.errors import BundleError, PromptError
from flamingo_reference.config import ModelConfig

BOS, EOC, IMAGE = "<BOS>", "<EOC>", "<image>"
"""The paper's tags, as they stand in prompts."""
TAGS = (BOS, EOC, IMAGE)
TOKENIZER_FILE = Path("tokenizer") / "tokenizer.json"
_REPLACEMENT = "\ufffd"
_MAX_HELD = 3  # tokens: a character has four bytes at most, and a token at least one


class Tokenizer:
    """Encodes prompts with their tags, decodes what was generated."""

    def __init__(self, tokenizer: Any, config: ModelConfig) -> None:
        """tokenizer: a `tokenizers.Tokenizer`. Raises PromptError if it is not of this model's vocabulary."""
        self._tokenizer = tokenizer
        self.ids = config.tokens
        self.special = frozenset(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        """Ids that leave no text when decoded."""
        _check_vocabulary(tokenizer, config)

    @classmethod
    def open(cls, bundle: Path, config: ModelConfig) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError if it has none that can be read, PromptError if it does not fit the model."""
        from tokenizers import Tokenizer as FastTokenizer

        path = bundle / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(
                f"{bundle} has no {TOKENIZER_FILE}, so text cannot be encoded. Build it with a tokenizer, or give token ids."
            )
        try:
            tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} cannot be read: {error}. Build the bundle again.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, config)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids; `<BOS>` is put first unless the text begins with it or add_bos is off. Raises PromptError for an empty text."""
        if not text.strip():
            raise PromptError("the prompt is empty. Give at least one word or tag, for example '<image>Output:'.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise PromptError(f"the text holds half of a surrogate pair, which is no character: {text[:80]!a}")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.ids.bos, *ids] if add_bos and ids[:1] != [self.ids.bos] else ids

    def encode_continuation(self, prompt: str, continuation: str) -> list[int]:
        """Ids of `continuation` where it follows `prompt`: a space is put between them unless one of them has it.

        Encoded together, so that words split as they do in running text; apart where they melt into one token.
        Raises PromptError if nothing is left to score.
        """
        if not continuation.strip():
            raise PromptError("a candidate answer is empty")
        if not (continuation[0].isspace() or prompt[-1:].isspace()):
            continuation = " " + continuation
        before = self.encode(prompt)
        together = self.encode(prompt + continuation)
        if len(together) > len(before) and together[: len(before)] == before:
            return together[len(before) :]
        return self.encode(continuation, add_bos=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without tags."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


class TextStream:
    """Tokens in, pieces of text out, whose concatenation is the decoded text: a character is held back until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding begins here: a few tokens early, since decoders treat the first token of a text differently
        self._sent = 0  # tokens up to here have been given out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        self._ids += [token for token in token_ids if token not in self._tokenizer.special]
        for held in range(_MAX_HELD):
            stop = max(self._sent, len(self._ids) - held)
            if not self._decode(stop).endswith(_REPLACEMENT):
                return self._take(stop)
        # Bytes before the last three belong to no unfinished character: what is broken there stays broken.
        return self._take(len(self._ids) - _MAX_HELD)

    def finish(self) -> str:
        """What was held back."""
        return self._take(len(self._ids))

    def _take(self, stop: int) -> str:
        if stop <= self._sent:
            return ""
        before, text = self._decode(self._sent), self._decode(stop)
        if len(text) > len(before):
            self._start, self._sent = self._sent, stop
        return text[len(before) :]

    def _decode(self, stop: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : stop])


def _check_vocabulary(tokenizer: Any, config: ModelConfig) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    size = config.language_model.vocab_size
    advice = "Use the tokenizer that the checkpoint was trained with."
    if largest >= size:
        raise PromptError(f"the tokenizer has ids up to {largest}, the model embeds {size} tokens. {advice}")
    wanted = {BOS: config.tokens.bos, EOC: config.tokens.eoc, IMAGE: config.tokens.image}
    faults = [
        f"{tag} is {vocabulary.get(tag, 'missing')}, expected {index}"
        for tag, index in wanted.items()
        if vocabulary.get(tag) != index
    ]
    if faults:
        raise PromptError(f"the tokenizer is of another vocabulary: {'; '.join(faults)}. {advice}")
