"""The contrastive encoder of a bundle by itself: images and texts as embeddings, and images classified by labels. No decoder is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from flamingo_export.backends.base import Backend, Session, SessionOptions
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import BundleError, InputError, PromptError
from flamingo_export.runtime.media import MediumSource, load_medium
from flamingo_export.runtime.tokenizer import TEXT_TOKENIZER_FILE
from flamingo_export.specs import IMAGE_TOWER, TEXT_TOWER
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.towers import LOGIT_SCALE
from flamingo_reference.contrastive_config import ContrastiveConfig, TextConfig

Embeddings = npt.NDArray[np.float32]
"""float32 [N, J], rows of length 1."""
FRAMES_AT_ONCE, TEXTS_AT_ONCE = 8, 64


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """A label with the cosine of its embedding and the image's, and its probability among the labels that were given."""

    label: str
    cosine: float
    probability: float


class ContrastiveEncoder:
    """Image and text tower of a bundle that has them. Close it, or use it in a `with` block, to free its memory. One thread at a time."""

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, options: SessionOptions | None = None) -> None:
        """Opens nothing yet but what the images need. Raises BundleError if the bundle has no contrastive encoder, BackendError."""
        if manifest.config.contrastive is None:
            raise BundleError(
                f"{bundle} has no contrastive encoder, so it cannot compare images with texts. Build it from a checkpoint that has one: nano, "
                "or OpenFlamingo with CLIP's whole file as --vision."
            )
        self.bundle, self.manifest = bundle, manifest
        self.config: ContrastiveConfig = manifest.config.contrastive
        self._backend, self._options = backend, options or SessionOptions()
        self._opened: dict[str, Session] = {}

    def embed_images(self, images: Sequence[MediumSource]) -> Embeddings:
        """An embedding of each image or Video, float32 [N, J]; of a video the mean of its frames'. Raises ImageError."""
        found = []
        for image in images:
            pixels = load_medium(image, self.manifest.config, self.manifest.inputs.fit).pixels
            found.append(self.embed_frames(pixels).mean(axis=0))
        return _unit(np.stack(found)) if found else np.zeros((0, self.config.joint_width), np.float32)

    def embed_frames(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        """Embeddings [F, J] of prepared frames [F, 3, I, I]."""
        vision, tower = self._session("vision_encoder"), self._session(IMAGE_TOWER)
        most = min(FRAMES_AT_ONCE, *(session.largest.get("F", FRAMES_AT_ONCE) for session in (vision, tower)))
        found = []
        for start in range(0, len(pixels), most):
            pooled = vision.run({"pixels": pixels[start : start + most]}, ("pooled",))["pooled"]
            found.append(tower.run({"pooled": pooled})["image_embedding"].astype(np.float32))
        return np.concatenate(found)

    def embed_texts(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        """An embedding of each text, float32 [N, J]. Token ids are taken as they are, the tokens that begin and end a text included.

        Raises InputError where there is no text tower or tokenizer, PromptError for a text that is empty or too long.
        """
        text = self._text
        ids = [self._token_ids(each, text) for each in texts]
        session = self._session(TEXT_TOWER)
        most = min(TEXTS_AT_ONCE, session.largest.get("B", TEXTS_AT_ONCE))
        # Texts of about the same length together, so that little is padding.
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        found = np.zeros((len(ids), self.config.joint_width), np.float32)
        for start in range(0, len(order), most):
            places = order[start : start + most]
            lengths = np.asarray([len(ids[place]) for place in places], np.int64)
            padded = np.zeros((len(places), int(lengths.max())), np.int64)
            for row, place in enumerate(places):
                padded[row, : lengths[row]] = ids[place]
            found[places] = session.run({"token_ids": padded, "lengths": lengths})["text_embedding"]
        return found

    def classify(self, image: MediumSource, labels: Sequence[str], *, template: str | None = None) -> list[LabelScore]:
        """The labels, the most likely first (zero-shot).

        template: the text that a label is put into, with {} for it; None takes the model's own. Ties keep the order of the labels.
        Raises InputError for labels that are empty or given twice, or a template without a place; ImageError, PromptError.
        """
        texts = self.label_texts(labels, template)
        cosines = (self.embed_images([image]) @ self.embed_texts(texts).T)[0].astype(np.float64)
        likely = np.exp(self.scale * (cosines - cosines.max()))
        likely /= likely.sum()
        scores = [
            LabelScore(label=label, cosine=float(cosine), probability=float(share))
            for label, cosine, share in zip(labels, cosines, likely, strict=True)
        ]
        return sorted(scores, key=lambda score: -score.cosine)

    def label_texts(self, labels: Sequence[str], template: str | None = None) -> list[str]:
        """Labels in the template. Raises InputError as `classify` does."""
        if isinstance(labels, str) or not labels:
            raise InputError("no labels were given. Give a list of at least one.")
        if empty := [place for place, label in enumerate(labels, start=1) if not label.strip()]:
            raise InputError(f"label {empty[0]} of {len(labels)} is empty. Leave it out.")
        if len(set(labels)) != len(labels):
            twice = next(label for label in labels if list(labels).count(label) > 1)
            raise InputError(f"the label {twice!r} was given twice. Leave one out: probabilities are shared among labels.")
        form = self.config.template if template is None else template
        if form.count("{}") != 1:
            raise InputError(
                f"the template {form!r} has {form.count('{}')} places for a label, expected one {{}}: 'a photo of a {{}}.'"
            )
        return [form.replace("{}", label) for label in labels]

    @cached_property
    def scale(self) -> float:
        """What cosines are multiplied with before they are compared: the inverse of the temperature that was learnt."""
        return float(np.exp(np.float64(WeightIndex.read(self.bundle).read_tensor(self.bundle, LOGIT_SCALE)[0])))

    @property
    def _text(self) -> TextConfig:
        if self.config.text is None:
            raise InputError(f"{self.bundle} has no text tower, only an image tower: give an image to search with.")
        return self.config.text

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = self.bundle / TEXT_TOKENIZER_FILE
        if not path.is_file():
            raise InputError(
                f"{self.bundle} has no {TEXT_TOKENIZER_FILE}, so texts cannot be encoded for its text tower. Build it with the tokenizer.json "
                "beside CLIP's file, or give token ids."
            )
        try:
            found = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} is malformed ({error}). Build the bundle again.") from error
        found.no_truncation()
        found.no_padding()
        return found

    def _token_ids(self, given: str | Sequence[int], text: TextConfig) -> list[int]:
        if isinstance(given, str):
            if not given.strip():
                raise PromptError("a text is empty. Give at least one word.")
            try:
                ids = list(self._tokenizer.encode(given).ids)
            except InputError:
                raise
            except Exception as error:  # half of a surrogate pair, say
                raise PromptError(f"the text {given[:80]!a} cannot be encoded ({error})") from None
        else:
            ids = [int(token) for token in given]
        if not 0 < len(ids) <= text.max_positions:
            shown = f" ({given[:60]!r}...)" if isinstance(given, str) else ""
            raise PromptError(
                f"a text has {len(ids)} tokens{shown}, the text tower takes 1 to {text.max_positions}. Shorten it: nothing is cut off."
            )
        if wrong := [token for token in ids if not 0 <= token < text.vocab_size]:
            raise PromptError(f"token {wrong[0]} is outside of the text tower's vocabulary of {text.vocab_size}")
        return ids

    def _session(self, name: str) -> Session:
        if name not in self._opened:
            graph = self.manifest.graph(name)
            self._opened[name] = self._backend.open(self.bundle, self.manifest, graph, self._options)
        return self._opened[name]

    def close(self) -> None:
        """Frees the graphs."""
        for session in self._opened.values():
            session.close()
        self._opened = {}

    def __repr__(self) -> str:
        towers = "images and texts" if self.config.text is not None else "images"
        return (
            f"ContrastiveEncoder({str(self.bundle)!r}: {towers} to {self.config.joint_width} numbers, on {self._backend.name})"
        )

    def __enter__(self) -> ContrastiveEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _unit(vectors: npt.NDArray[Any]) -> Embeddings:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Embeddings = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit
