"""transformers' IDEFICS as what is evaluated: the original beside the bundle, on the same items, the same prompts and the same tokens.

Model, masks and generation are transformers'. Token ids come from the checkpoint's own tokenizer, pixels from the preprocessing that IDEFICS
was trained with, as the bundle takes them. Everything is held in fp32 in PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.errors import CapacityError, EvaluationError
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.runtime.request import Prepared, Request, prepare
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_reference.input_format import InputFormat

if TYPE_CHECKING:
    from torch import Tensor


class TransformersIdefics:
    """An IDEFICS checkpoint in transformers' own format."""

    def __init__(self, folder: Path | str) -> None:
        """Loads the weights. Raises EvaluationError where transformers is missing or the folder holds no IDEFICS; CheckpointError."""
        from flamingo_export.sources.checkpoint import CheckpointSource
        from flamingo_export.validate.expected.transformers.idefics import Idefics

        self.folder = Path(folder)
        source = CheckpointSource(self.folder)
        if source.checkpoint.family.name != "idefics":
            raise EvaluationError(
                f"{self.folder} is of family {source.checkpoint.family.name}; transformers evaluates IDEFICS checkpoints"
            )
        import torch

        _, kind = Idefics().classes()
        self._torch = torch
        self._config, self._inputs = source.config, source.inputs
        self._tokenizer = _tokenizer(source)
        self._files = [(path.name, path.stat().st_size) for path in source.checkpoint.files]
        self._model: Any = kind.from_pretrained(self.folder, dtype=torch.float32).eval()
        never = torch.tensor(list(self._config.tokens.never), dtype=torch.int64)
        # The runtime takes tokens that are never generated out before the softmax.
        self._model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, never, -torch.inf))

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Name, a digest of names and sizes of its files, fp32, transformers' version."""
        from importlib.metadata import version

        digest = hashlib.sha256(repr(sorted(self._files)).encode()).hexdigest()
        return {
            "name": self.folder.name,
            "digest": digest,
            "precision": "fp32",
            "backend": f"transformers {version('transformers')}",
        }

    @property
    def inputs(self) -> InputFormat:
        """The checkpoint's, as a bundle of it has them."""
        return self._inputs

    def check(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> None:
        """Raises CapacityError for prompts beyond the positions that the model has."""
        most = self._config.language_model.position_limit
        longest = max((str(request.prompt) for request in requests), key=len, default="")
        needed = len(self._tokenizer.encode(longest)) + max_new_tokens if longest else 0
        if most is not None and needed > most:
            raise CapacityError(f"the longest prompt needs {needed} positions, the model has {most}. Give fewer shots.")

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[Answer]:
        """transformers' beam search, as the runtime defines it: no length penalty, no early stopping."""
        return [self._generated(self._prepared(request), beams, max_new_tokens) for request in requests]

    def score(self, requests: Sequence[Request], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods by teacher forcing, the end token included."""
        return [
            [self._logprob(request, candidate) for candidate in choices]
            for request, choices in zip(requests, candidates, strict=True)
        ]

    def _prepared(self, request: Request) -> Prepared:
        return prepare(request, self._config, self._tokenizer, fit=self._inputs.fit, forms=self._inputs.prompts)

    def _generated(self, prepared: Prepared, beams: int, new_tokens: int) -> Answer:
        torch, ids = self._torch, self._config.tokens
        with torch.no_grad():
            out = self._model.generate(
                **self._feeds(prepared, prepared.token_ids.tolist()),
                attention_mask=torch.ones(1, len(prepared.token_ids), dtype=torch.int64),
                num_beams=beams,
                do_sample=False,
                length_penalty=0.0,
                early_stopping=False,
                max_new_tokens=new_tokens,
                eos_token_id=list(ids.stops),
                pad_token_id=ids.pad,
            )
        tokens = out[0, len(prepared.token_ids) :].tolist()
        end = next((place for place, token in enumerate(tokens) if token in ids.stops), len(tokens))
        tokens = tokens[: end + 1]
        logprobs = self._token_logprobs(prepared, tokens)
        return Answer(
            text=self._tokenizer.decode(tokens).strip(),
            token_ids=tuple(tokens),
            token_logprobs=tuple(logprobs),
            finished=bool(tokens) and tokens[-1] in ids.stops,
        )

    def _logprob(self, request: Request, candidate: str) -> float:
        prepared, end = self._prepared(request), self._inputs.tags.eoc
        text = candidate if candidate.endswith(end) else candidate + end
        return float(sum(self._token_logprobs(prepared, self._tokenizer.encode_continuation(str(request.prompt), text))))

    def _token_logprobs(self, prepared: Prepared, tokens: Sequence[int]) -> list[float]:
        torch = self._torch
        sequence = [*prepared.token_ids.tolist(), *tokens]
        with torch.no_grad():
            logits: Tensor = self._model(use_cache=False, **self._feeds(prepared, sequence)).logits[0]
        start = len(prepared.token_ids) - 1
        found = logits[start : start + len(tokens)].double().log_softmax(-1)
        return [float(found[place, token]) for place, token in enumerate(tokens)]

    def _feeds(self, prepared: Prepared, tokens: Sequence[int]) -> dict[str, Any]:
        """transformers' inputs: tokens [1, S], pixels [1, M, 3, I, I] and its own mask [1, S, M] of which image each token sees."""
        torch, side = self._torch, self._config.vision.image_size
        order = [medium for medium in prepared.keys if isinstance(medium, bytes)]
        by_digest = {medium.digest: medium.pixels for medium in prepared.media}
        frames = [by_digest[digest] for digest in order]
        if any(len(each) != 1 for each in frames):
            raise EvaluationError("transformers' IDEFICS takes images; videos are for bundles")
        # transformers wants an image; where there is none, no token sees it.
        pixels = torch.from_numpy(np.concatenate(frames) if frames else np.zeros((1, 3, side, side), np.float32))
        token_ids = torch.tensor([list(tokens)])
        return {
            "input_ids": token_ids,
            "pixel_values": pixels[None],
            "image_attention_mask": _seen(token_ids, len(pixels), self._config.tokens),
        }


def _seen(token_ids: Tensor, num_images: int, tokens: Any) -> Tensor:
    """transformers' own [B, S, M]."""
    processing: Any = importlib.import_module("transformers.models.idefics.processing_idefics")

    class _Ids:
        eos_token_id = tokens.reset

        @staticmethod
        def convert_tokens_to_ids(_: Any) -> int:
            return int(tokens.image)

    seen, _ = processing.image_attention_mask_for_packed_input_ids(token_ids, _Ids(), "pt")
    mask: Tensor = processing.incremental_to_binary_attention_mask(seen, "pt", num_classes=num_images)
    return mask


def _tokenizer(source: Any) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    from flamingo_export.bundle.bundled_tokenizer import checked_tokenizer

    if source.tokenizer is None:
        raise EvaluationError("the checkpoint has no tokenizer, so no prompt can be encoded")
    fast = FastTokenizer.from_str(checked_tokenizer(source.tokenizer, source.config, source.inputs.tags))
    fast.no_truncation()
    fast.no_padding()
    return Tokenizer(fast, source.config, source.inputs.tags)
