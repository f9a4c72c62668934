"""What tests of the runtime share: a loaded tiny bundle, and an oracle that sees whole sequences and has no cache, bank or batches."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest, write_manifest
from flamingo_export.runtime.images import preprocess
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

IMAGE, EOC = 3, 2
LoadTiny = Callable[..., Model]


class Oracle:
    """The reference in float64, fed whole sequences."""

    def __init__(self, model: Flamingo) -> None:
        self.model = copy.deepcopy(model).double()
        self.config = model.config

    def logits(self, ids: Sequence[int], media: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """float64 [S, V]; media: the frames, uint8 [H, W, 3], of each medium in order."""
        with torch.no_grad():
            latents = [
                self.model.latents(torch.tensor(np.stack([preprocess(f, self.config) for f in m]))[None].double())
                for m in media
            ]
            bank = (
                torch.cat(latents)
                if latents
                else torch.zeros(1, self.config.resampler.num_latents, self.config.resampler.width).double()
            )
            tokens = torch.tensor([list(ids)])
            rows = torch.arange(max(1, len(media)))[None]
            return self.model(tokens, self.model.media_kv(bank), rows, (tokens == IMAGE).cumsum(1))[0].numpy()

    def logprobs(self, ids: Sequence[int], media: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """float64 [S, V], `<image>` excluded."""
        logits = self.logits(ids, media)
        logits[:, IMAGE] = -np.inf
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def greedy(self, ids: Any, media: Sequence[Sequence[np.ndarray]], count: int) -> list[int]:
        ids, start = list(ids), len(ids)
        while len(ids) - start < count and (len(ids) == start or ids[-1] != EOC):
            ids.append(int(self.logprobs(ids, media)[-1].argmax()))
        return ids[start:]

    def beams(
        self,
        ids: Any,
        media: Sequence[Sequence[np.ndarray]],
        beams: int,
        count: int,
    ) -> list[tuple[list[int], float]]:
        """Beam search with length penalty 0, written anew: (tokens, score), best first."""
        live: list[tuple[list[int], float]] = [([], 0.0)]
        kept: list[tuple[list[int], float]] = []
        for step in range(1, count + 1):
            options = [
                ([*tokens, token], score + float(logprob))
                for tokens, score in live
                for token, logprob in enumerate(self.logprobs([*ids, *tokens], media)[-1])
            ]
            options = sorted(options, key=lambda option: -option[1])[: 2 * beams]
            kept += [option for option in options[:beams] if option[0][-1] == EOC or step == count]
            kept = sorted(kept, key=lambda option: -option[1])[:beams]
            live = [option for option in options if option[0][-1] != EOC][:beams]
            if len(kept) == beams and live[0][1] <= kept[-1][1]:
                break
        return kept


@pytest.fixture(scope="session")
def oracle(tiny_model: Flamingo) -> Oracle:
    return Oracle(tiny_model)


@pytest.fixture
def load_tiny(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadTiny]:
    """Loads the tiny bundle, with other limits where given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ExitStack() as stack:

        def load(**limits: int) -> Model:
            bundle = tiny_bundle
            if limits:
                bundle = tmp_path / f"tiny-{'-'.join(map(str, limits.values()))}.bundle"
                shutil.copytree(tiny_bundle, bundle)
                manifest = read_manifest(bundle)
                write_manifest(
                    bundle, msgspec.structs.replace(manifest, limits=msgspec.structs.replace(manifest.limits, **limits))
                )
            return stack.enter_context(flamingo_export.load(bundle, threads=1))

        yield load


@pytest.fixture(scope="session")
def tiny_llama():
    """A language model of transformers: the oracle of searches."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of beam search")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=EOC,
        pad_token_id=0,
        initializer_range=0.6,
    )
    return transformers.LlamaForCausalLM(config).eval()


def pictures(seed: int, count: int) -> list[np.ndarray]:
    """Random images of various sizes."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (int(rng.integers(10, 60)), int(rng.integers(10, 60)), 3), dtype=np.uint8) for _ in range(count)
    ]


def random_prompt(config: ModelConfig, seed: int, length: int, num_media: int) -> list[int]:
    """`<BOS>` and random words, with `<image>` at random places after it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, config.language_model.vocab_size, length)
    ids[0] = config.tokens.bos
    ids[rng.choice(np.arange(1, length), num_media, replace=False)] = IMAGE
    return ids.tolist()


def random_request(config: ModelConfig, seed: int, length: int, num_media: int) -> Request:
    return Request(prompt=random_prompt(config, seed, length, num_media), media=pictures(seed, num_media))


def frames_of(request: Request) -> list[list[np.ndarray]]:
    """A request's media for the oracle: each image is one frame."""
    return [[np.asarray(image)] for image in request.media]
