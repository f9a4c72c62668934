"""Stage two: the language model, on text only.

The text is that of the documents, their images left out of sight: `<image>` is no more than markup here. From pages of one format the
model learns to go on as the examples before it did, which is what few-shot prompts rest on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from flamingo_reference.config import ModelConfig
from flamingo_reference.model.decoder import LanguageModel
from flamingo_reference.nano import pages
from flamingo_reference.nano.pool import Pool, random_style

# (documents, tokens each, share of steps): mostly short, some long enough for 32 shots.
BATCHES = ((28, 80, 0.75), (12, 176, 0.17), (5, 384, 0.08))


def text_document(rng: np.random.Generator, pool: Pool, *, length: int) -> list[pages.Piece]:
    """Pieces of one style, enough for `length` tokens."""
    kind = str(rng.choice(["scene", "digit", "video"], p=[0.7, 0.15, 0.15]))
    draw = pool.drawer(kind)
    if rng.random() < 0.12:
        return pages.interleaved_page(pool.items, rng, draw)
    style = random_style(rng, pool, kind)
    shots = max(1, length // 4)
    text_only = shots if rng.random() < 0.15 else (2 if rng.random() < 0.2 else 0)
    return pages.prompt_page(pool.items, rng, draw, style=style, shots=shots, text_only=text_only)


def train_language(
    config: ModelConfig, tokenizer: Tokenizer, *, steps: int, seed: int, log: Callable[[str], None]
) -> LanguageModel:
    """A trained language model."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    pool = Pool(scenes=6000, digits=1300, videos=800)
    model = LanguageModel(config.language_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05, betas=(0.9, 0.98))
    peak, warm_up = 2e-3, 80
    kinds = [share for _, _, share in BATCHES]
    losses: list[float] = []
    for step in range(steps):
        documents, length, _ = BATCHES[int(rng.choice(len(BATCHES), p=kinds))]
        ids = np.full((documents, length + 1), config.tokens.pad)
        for row in ids:
            encoded = pages.encode(text_document(rng, pool, length=length), tokenizer, config.tokens)
            size = min(length + 1, len(encoded.token_ids))
            row[:size] = encoded.token_ids[:size]
        scale = min(1.0, (step + 1) / warm_up)
        if step > steps * 0.4:
            scale = 0.5 + 0.5 * float(np.cos(np.pi * (step - steps * 0.4) / (steps * 0.6)))
        optimizer.param_groups[0]["lr"] = peak * max(scale, 0.02)
        tokens = torch.from_numpy(ids)
        targets = tokens[:, 1:].clone()
        targets[(targets == config.tokens.pad) | (targets == config.tokens.image)] = -100
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            log(f"language step {step}/{steps} loss {np.mean(losses[-25:]):.3f}")
    return model.eval()
