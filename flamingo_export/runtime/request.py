"""What is asked of the model, and its checked form: everything a user can get wrong is found here, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flamingo_export.errors import PromptError
from flamingo_export.runtime.cache import Key
from flamingo_export.runtime.media import Medium, MediumSource, RecentMedia, load_medium
from flamingo_export.runtime.tokenizer import Tokenizer, without_last_blanks
from flamingo_reference.arrays import Ints
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import PAPER, ImageFit, PromptForms
from flamingo_reference.phi import media_ranges, phi_from_tokens


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with what it shows.

    prompt: text or token ids, with the model's image tag (`<image>`) for each of the media. Blanks at the end of a text are left out: the
    text that follows brings its own, and a model never saw one by itself.
    media: images and videos, in the order of their tags.
    seed: of this request's samples, in place of the call's.
    quoted: questions, answers and captions within the prompt, in which no special token may stand; the prompt helpers fill it.
    forms: those the prompt was made in, None where it was written by hand; a model of other forms refuses it.
    """

    prompt: str | Sequence[int]
    media: Sequence[MediumSource] = field(default_factory=list)
    seed: int | None = None
    quoted: tuple[str, ...] = ()
    forms: PromptForms | None = None

    def __repr__(self) -> str:
        shown = repr(self.prompt) if isinstance(self.prompt, str) else f"{len(self.prompt)} token ids"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"Request({shown}, {_count(len(self.media), 'medium', 'media')}{seed})"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request ready to run: token_ids and phi int64 [P], decoded media, and the keys by which the cache knows each position.

    phi counts rows of media, of which an image of tiles has several. first, int64 [P]: where a position sees a range of media, first .. phi,
    the first of it; None where it sees the one that phi names.
    """

    token_ids: Ints
    phi: Ints
    media: tuple[Medium, ...]
    keys: tuple[Key, ...]
    first: Ints | None = None

    @property
    def num_media(self) -> int:
        """What phi counts up to."""
        return sum(medium.rows for medium in self.media)

    @property
    def looked_at(self) -> range:
        """The media, counted from 1, that what follows the prompt sees: one, or several that stand side by side; empty where it sees none."""
        last = int(self.phi[-1])
        if last == 0:
            return range(0)
        first = last if self.first is None else int(self.first[-1])
        of_row = np.repeat(np.arange(len(self.media)), [medium.rows for medium in self.media])
        return range(int(of_row[first - 1]) + 1, int(of_row[last - 1]) + 2)


def prepare(
    request: Request,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    known: dict[bytes, Medium] | None = None,
    *,
    recent: RecentMedia | None = None,
    fit: ImageFit = "pad",
    forms: PromptForms | None = None,
) -> Prepared:
    """Encodes and checks a request, and decodes its media.

    tokenizer: may be None where the prompt is token ids. known: media of other requests by digest, so that what is shown by many is held
    in memory once; this request's are added. recent: images that earlier requests showed, which are not prepared again. fit: how images become
    squares. forms: the model's, None where any will do.
    Raises PromptError for an empty prompt, ids outside the vocabulary, a wrong number of media, tags of another family, another family's
    forms or special tokens in what a user wrote; ImageError for media that cannot be read.
    """
    if forms is not None and request.forms is not None and request.forms != forms:
        raise PromptError(
            f"the prompt is in the form {request.forms.question!r}, this bundle's is {forms.question!r}. "
            "Use model.caption or model.ask, or give the helper the bundle's own: caption_prompt(shots, image, model.inputs)."
        )
    if isinstance(request.prompt, str):
        if tokenizer is None:
            raise PromptError("the bundle has no tokenizer, so text cannot be encoded. Give the prompt as token ids.")
        tokenizer.check_tags(request.prompt)
        for text in request.quoted:
            tokenizer.check_quoted(text)
        ids = np.asarray(tokenizer.encode(without_last_blanks(request.prompt)), np.int64)
    else:
        ids = _checked_ids(request.prompt, config)
    tags, given = int((ids == config.tokens.image).sum()), len(request.media)
    if tags != given:
        advice = "Add a tag for each image or video" if given > tags else "Give an image or video for each tag"
        tag = PAPER.tags.image if tokenizer is None else tokenizer.image
        raise PromptError(
            f"the prompt has {_count(tags, f'{tag} tag')}, but {_count(given, 'image or video', 'images or videos')} "
            f"{'was' if given == 1 else 'were'} given. {advice}, in order."
        )
    known = {} if known is None else known
    loaded = (load_medium(source, config, fit, recent=recent) for source in request.media)
    media = tuple(known.setdefault(medium.digest, medium) for medium in loaded)
    return prepared_from_ids(ids, media, config)


def prepared_from_ids(ids: Ints, media: tuple[Medium, ...], config: ModelConfig) -> Prepared:
    """A request from its token ids, int64 [P], and as many media as there are `<image>` tokens among them, in order."""
    first = None
    if config.sees_groups:
        rows = np.array([[medium.rows for medium in media]], np.int64)
        (first,), (phi,) = media_ranges(ids[None], config.tokens.image, rows)
    else:
        phi = phi_from_tokens(ids[None], config.tokens.image, config.tokens.reset)[0]
    digests = iter(media)
    keys = tuple(next(digests).digest if token == config.tokens.image else token for token in ids.tolist())
    return Prepared(token_ids=ids, phi=phi, media=media, keys=keys, first=first)


def _checked_ids(prompt: Sequence[int], config: ModelConfig) -> Ints:
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(f"a prompt is given as {type(prompt).__name__}; give a text or a list of token ids")
    if len(prompt) == 0:
        raise PromptError("the prompt is empty. Give at least one token.")
    try:
        ids = np.asarray(prompt)
    except ValueError as error:  # lists of several lengths
        raise PromptError(f"the prompt is not a list of token ids ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise PromptError(f"token ids are {ids.dtype} of shape {ids.shape}, expected a list of integers")
    size = config.language_model.embedding_rows
    if ids.min() < 0 or ids.max() >= size:
        raise PromptError(f"token ids go from {ids.min()} to {ids.max()}, the model knows 0 to {size - 1}")
    return ids.astype(np.int64)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
