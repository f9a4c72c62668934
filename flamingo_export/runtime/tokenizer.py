"""Text to token ids and back, by the bundle's `tokenizer/tokenizer.json`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flamingo_export.errors import BundleError, PromptError
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import FAMILY_TAGS, PAPER, Tags

TOKENIZER_FILE = Path("tokenizer") / "tokenizer.json"
TEXT_TOKENIZER_FILE = Path("tokenizer") / "text_tower.json"
"""Of the text tower of a contrastive encoder."""
_REPLACEMENT = "\ufffd"
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
T = TypeVar("T")
_MAX_HELD = 3  # tokens: a character has four bytes at most, and a token at least one


class Tokenizer:
    """Encodes prompts with their tags, decodes what was generated."""

    def __init__(self, tokenizer: Any, config: ModelConfig, tags: Tags = PAPER.tags) -> None:
        """tokenizer: a `tokenizers.Tokenizer`. Raises PromptError if it is not of this model's vocabulary."""
        self._tokenizer, self._tags = tokenizer, tags
        self.ids = config.tokens
        special = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special = frozenset(special)
        """Ids that leave no text when decoded."""
        self.special_texts = tuple(dict.fromkeys((*tags.all, *special.values())))
        """Texts that are read as such tokens."""
        self._byte_of = _fallback_bytes(tokenizer)
        self._token_of = {byte: token for token, byte in self._byte_of.items()}
        _check_vocabulary(tokenizer, config, tags)

    @classmethod
    def open(cls, bundle: Path, config: ModelConfig, tags: Tags = PAPER.tags) -> Tokenizer:
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
        return cls(tokenizer, config, tags)

    def to_json(self) -> str:
        """The tokenizer as the `tokenizers` library writes it."""
        text: str = self._tokenizer.to_str()
        return text

    @property
    def image(self) -> str:
        """The tag that stands for an image."""
        return self._tags.image

    def __repr__(self) -> str:
        return f"Tokenizer({self._tokenizer.get_vocab_size(with_added_tokens=True)} tokens, tags {' '.join(self._tags.all)})"

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids. Raises PromptError for an empty text.

        `<BOS>` is put first unless the text begins with it, the model was trained without or add_bos is off (behind leading images where
        the tags say so); every image gets the tags that the model was trained to see around it.
        """
        if not text.strip():
            raise PromptError("the prompt is empty. Give at least one word or tag, for example '<image>Output:'.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise PromptError(f"the text holds half of a surrogate pair, which is not a character: {text[:80]!a}")
        marked = with_tags_around(text, self._tags)
        if self._tags.bos_after_images and add_bos:
            marked = with_bos_after_images(marked, self._tags)
        ids: list[int] = _guarded(lambda: self._tokenizer.encode(marked, add_special_tokens=False).ids, text)
        wanted = add_bos and self._tags.bos is not None and not self._tags.bos_after_images and ids[:1] != [self.ids.bos]
        return [self.ids.bos, *ids] if wanted else ids

    def encode_continuation(self, prompt: str, continuation: str) -> list[int]:
        """Ids of `continuation` where it follows `prompt`. A space begins it, as words begin in running text, unless it has a blank, begins with
        a special token (`<EOC>`: nothing more is said) or the prompt ends a line; the blanks at the prompt's end are what this space stands
        for, so they change nothing.

        Encoded together, so that words split as they do in running text; apart where they melt into one token.
        Raises PromptError if nothing is left to score.
        """
        if not continuation.strip():
            raise PromptError("a candidate answer is empty")
        prompt = without_last_blanks(prompt)
        if not (continuation[0].isspace() or continuation.startswith(self.special_texts) or prompt[-1:].isspace()):
            continuation = " " + continuation
        before = self.encode(prompt)
        together = self.encode(prompt + continuation)
        if len(together) > len(before) and together[: len(before)] == before:
            return together[len(before) :]
        return self.encode(continuation, add_bos=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without tags. Bytes that belong to no whole character become U+FFFD, and nothing else does."""
        ids = [token for token in token_ids if token not in self.special]
        text: str = self._tokenizer.decode(self._whole_characters(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text, a tag as it is written. A token that is part of a character has the replacement sign in its place."""
        text: str = self._tokenizer.decode([int(token_id)], skip_special_tokens=False)
        return text

    def check_quoted(self, text: str) -> None:
        """Raises PromptError if a special token stands in what a user wrote: it would end the text or shift every later image."""
        normalizer = self._tokenizer.normalizer
        # ＜/s＞ may become </s>
        normalized = text if normalizer is None else _guarded(lambda: normalizer.normalize_str(text), text)
        for special in self.special_texts:
            if special in text or special in normalized:
                raise PromptError(f"{text!r} contains {special}, which the model reads as a token of its own; give plain text")

    def check_tags(self, text: str) -> None:
        """Raises PromptError for tags of another family in a prompt, which this tokenizer would read as plain text."""
        for tag in FAMILY_TAGS:
            if tag in text and tag not in self.special_texts and self._tokenizer.token_to_id(tag) is None:
                raise PromptError(
                    f"the prompt has {tag}, a tag of another family of models, which this bundle's tokenizer reads as plain text. "
                    f"Its own are {', '.join(self._tags.all)}."
                )

    def _whole_characters(self, token_ids: list[int]) -> list[int]:
        """The tokens, bytes that do not form a character among them replaced by those of U+FFFD: where one byte of a run is broken, the library
        drops the whole run."""
        if not any(token in self._byte_of for token in token_ids):
            return token_ids
        whole: list[int] = []
        for is_byte, run in itertools.groupby(token_ids, self._byte_of.__contains__):
            if is_byte:
                text = bytes(self._byte_of[token] for token in run).decode("utf-8", errors="replace")
                whole += [self._token_of[byte] for byte in text.encode("utf-8")]
            else:
                whole += run
        return whole


def _guarded(call: Callable[[], T], text: str) -> T:
    """What the library makes of a text. Raises PromptError where it cannot: it raises plain Exception where a text has no tokens, and its
    panics (of a damaged table of characters) are not even that."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PromptError(
            f"the bundle's tokenizer cannot encode {text[:80]!r} ({error}). Build it with a whole one."
        ) from error


def with_tags_around(text: str, tags: Tags) -> str:
    """The text with `tags.around_image` before and after every image, once between images that follow each other; given ones are kept."""
    around, image = tags.around_image, tags.image
    if around is None:
        return text
    images = re.compile(f"(?:{re.escape(around)})*(?:{re.escape(image)}(?:{re.escape(around)})*)+")
    return images.sub(lambda run: around + f"{image}{around}" * run.group().count(image), text)


def with_bos_after_images(text: str, tags: Tags) -> str:
    """The text with `tags.bos` behind the images that it begins with, unless it has one (transformers' MllamaProcessor)."""
    if tags.bos is None or tags.bos in text:
        return text
    images = re.match(f"(?:{re.escape(tags.image)})*", text)
    end = images.end() if images else 0
    return text[:end] + tags.bos + text[end:]


def without_last_blanks(text: str) -> str:
    """The text without the blanks at its end; ends of lines stay, since they say something."""
    end = len(text)
    while end and text[end - 1].isspace() and text[end - 1] not in _LINE_ENDS:
        end -= 1
    return text[:end]


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


def _fallback_bytes(tokenizer: Any) -> dict[int, int]:
    """Bytes by the tokens that stand for them, where the tokenizer's decoder puts characters together from such tokens."""
    tokens = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    letter = tokens[ord("A")]
    if None in tokens.values() or tokenizer.decode([letter], skip_special_tokens=False) != "A":
        return {}
    return {token: byte for byte, token in tokens.items()}


def _check_vocabulary(tokenizer: Any, config: ModelConfig, tags: Tags) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    size = config.language_model.embedding_rows
    advice = "Use the tokenizer that the checkpoint was trained with."
    if largest >= size:
        raise PromptError(f"the tokenizer has ids up to {largest}, the model embeds {size} tokens. {advice}")
    wanted = {tags.eoc: config.tokens.eoc, tags.image: config.tokens.image}
    if tags.bos is not None:
        wanted = {tags.bos: config.tokens.bos, **wanted}
    faults = [
        f"{tag} is {vocabulary.get(tag, 'missing')}, expected {index}"
        for tag, index in wanted.items()
        if vocabulary.get(tag) != index
    ]
    if tags.around_image is not None and tags.around_image not in vocabulary:
        faults.append(f"{tags.around_image} is missing")
    if faults:
        raise PromptError(f"the tokenizer is of another vocabulary: {'; '.join(faults)}. {advice}")
