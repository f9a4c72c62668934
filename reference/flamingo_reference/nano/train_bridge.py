"""Stage three: resampler and gated cross-attention, between a vision encoder and a language model that stay as they are.

The paper's recipe (section 2.4, appendix B.1) in small: each step adds the gradients of all datasets with the paper's weights. Ours: the
loss is on what is said of an image, not on the questions; a higher rate for the gates; the rate falls over the last half of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from flamingo_reference.model import Flamingo
from flamingo_reference.nano import pages
from flamingo_reference.nano.batches import collate, to_pixels
from flamingo_reference.nano.pool import Pool, random_style
from flamingo_reference.time_weights import time_weights

# Flamingo (arXiv 2204.14198), appendix B.1.2: M3W, ALIGN, LTIP, VTP.
WEIGHTS = {"pages": 1.0, "scene pairs": 0.2, "digit pairs": 0.2, "videos": 0.03}
DOCUMENTS = {"pages": 24, "scene pairs": 32, "digit pairs": 24, "videos": 16}


def page(rng: np.random.Generator, pool: Pool) -> list[pages.Piece]:
    """A page of up to five images: a few-shot prompt of one style, or captions interleaved with images."""
    kind = str(rng.choice(["scene", "digit"], p=[0.8, 0.2]))
    draw = pool.drawer(kind)
    if rng.random() < 0.12:
        return pages.interleaved_page(pool.items, rng, draw)
    style = random_style(rng, pool, kind)
    text_only = 2 if rng.random() < 0.25 else 0
    shots = int(rng.integers(1, pages.MAX_IMAGES + 1))
    return pages.prompt_page(pool.items, rng, draw, style=style, shots=shots + text_only, text_only=text_only)


def pair(rng: np.random.Generator, pool: Pool, kind: str) -> list[pages.Piece]:
    """One medium and its caption, bare as in the paper's pairs or behind `Output:`; a video's question now and then."""
    index = pool.drawer(kind)(rng, "caption")
    if kind == "video" and rng.random() < 0.3:
        return [pages.shot(pool.items[index], index, rng, style="question")]
    prompt = "Output:" if rng.random() < 0.7 else ""
    return [pages.Piece(index, prompt, " " + pool.items[index].caption)]


class Features:
    """The frozen vision encoder's output for every item of a pool, computed once [T, P, E]."""

    def __init__(self, model: Flamingo, pool: Pool) -> None:
        frames = [frame for item in pool.items for frame in item.frames]
        with torch.no_grad():
            encoded = torch.cat(
                [
                    model.vision_encoder(to_pixels(frames[start : start + 128], model.config))
                    for start in range(0, len(frames), 128)
                ]
            )
        self._of_item = encoded.split([len(item.frames) for item in pool.items])

    def latents(self, model: Flamingo, media: Sequence[int]) -> Tensor:
        """Latents [N, R, W] of items with equal numbers of frames."""
        features = torch.stack([self._of_item[index] for index in media])
        weights = time_weights(features.shape[1], model.config.resampler.num_time_embeddings)
        latents: Tensor = model.resampler(features, torch.from_numpy(weights))
        return latents


def document_loss(model: Flamingo, features: Features, documents: Sequence[pages.Encoded]) -> Tensor:
    """Mean negative log-likelihood of what is said of a medium."""
    tokens, phi, wanted, rows, bank = collate(documents)
    logits = model(tokens, model.media_kv(features.latents(model, bank)), rows, phi)
    wanted &= phi > 0  # text whose image was left out cannot be known
    return F.cross_entropy(logits[:, :-1][wanted[:, 1:]], tokens[:, 1:][wanted[:, 1:]])


@torch.no_grad()
def initialise(model: Flamingo) -> None:
    """Unit-variance projections in the gated blocks: what is seen must not drown. The resampler starts as the contrastive head's."""
    for name, parameter in model.cross_attention.named_parameters():
        if name.endswith(("proj.weight", "ffw_up.weight", "ffw_down.weight")):
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)


def train_bridge(
    model: Flamingo,
    tokenizer: Tokenizer,
    *,
    steps: int,
    seed: int,
    log: Callable[[str], None],
    keep: Callable[[Flamingo], None] | None = None,
) -> Flamingo:
    """Trains `model.resampler`, as it is, and `model.cross_attention`, anew, in place; returns the model.

    keep: called with the unfinished model every 200 steps.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    pool = Pool(scenes=20000, digits=5000, videos=2500)
    features = Features(model.eval(), pool)
    frames_of = {index: len(item.frames) for index, item in enumerate(pool.items)}
    model.requires_grad_(False)
    model.resampler.requires_grad_(True)
    model.cross_attention.requires_grad_(True)
    initialise(model)
    gates = [parameter for name, parameter in model.cross_attention.named_parameters() if name.endswith("_gate")]
    rest = [parameter for name, parameter in model.cross_attention.named_parameters() if not name.endswith("_gate")]
    groups = [
        {"params": list(model.resampler.parameters()), "weight_decay": 0.0, "peak": 3e-3},
        {"params": rest, "weight_decay": 0.1, "peak": 3e-3},
        {"params": gates, "weight_decay": 0.0, "peak": 3e-2},
    ]
    trained = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    seen: dict[str, list[float]] = {name: [] for name in WEIGHTS}
    for step in range(steps):
        scale = min(1.0, (step + 1) / 60)
        if step > steps * 0.5:
            scale = 0.5 + 0.5 * float(np.cos(np.pi * (step - steps * 0.5) / (steps * 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(scale, 0.02)
        optimizer.zero_grad(set_to_none=True)
        for name, weight in WEIGHTS.items():
            documents = [pages.encode(pieces, tokenizer, model.config.tokens) for pieces in _batch(name, rng, pool, frames_of)]
            loss = document_loss(model, features, documents)
            (weight * loss).backward()
            seen[name].append(loss.item())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            losses = ", ".join(f"{name} {np.mean(values[-25:]):.3f}" for name, values in seen.items())
            log(f"bridge step {step}/{steps} {losses}")
        if keep is not None and step % 200 == 199:
            keep(model)
    return model.eval().requires_grad_(True)


def _batch(name: str, rng: np.random.Generator, pool: Pool, frames_of: dict[int, int]) -> list[list[pages.Piece]]:
    if name == "pages":
        return [page(rng, pool) for _ in range(DOCUMENTS[name])]
    kind = {"scene pairs": "scene", "digit pairs": "digit", "videos": "video"}[name]
    documents = [pair(rng, pool, kind) for _ in range(DOCUMENTS[name])]
    if kind == "video":  # one number of frames per step, so that they stack
        wanted = int(rng.integers(4, 9))
        if wanted not in {frames_of[index] for index, item in enumerate(pool.items) if item.kind == kind}:
            wanted = frames_of[documents[0][0].medium or 0]  # a small pool need not hold every number
        while (
            len(alike := [document for document in documents if frames_of[document[0].medium or 0] == wanted]) < DOCUMENTS[name]
        ):
            documents.append(pair(rng, pool, kind))
        documents = alike
    return documents
