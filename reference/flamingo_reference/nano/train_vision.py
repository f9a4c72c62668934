"""Stage one: the vision encoder, trained contrastively with a small text encoder that is thrown away afterwards.

As the paper's vision encoder (appendix B.1.3): two-way contrastive loss. In small: each batch holds hard negatives, scenes that differ
from another in one attribute of one object, and the joint space is read from the grid by a small resampler, as the bridge will read it.
A linear head on the flattened grid lets each position write a code of its own, which a resampler, which does not know positions, reads badly
(a probe on the frozen grid got 45 % of held-out scenes right; width, head and data changed together, so the cause need not be the head).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from flamingo_reference.config import ModelConfig
from flamingo_reference.model.resampler import PerceiverResampler
from flamingo_reference.model.vision import make_vision_encoder
from flamingo_reference.nano import pictures
from flamingo_reference.nano.batches import to_pixels
from flamingo_reference.time_weights import time_weights

VARIANTS = 6  # scenes of a batch that share all but one attribute
DIGITS, ROAMING = 0.13, 0.08  # shares of a batch; the rest are scenes
CLIPS_EVERY = 6  # one step in six is on videos
MAX_TEXT = 48


class TextEncoder(nn.Module):
    """Token ids [B, S] (0 pads) to the joint space [B, J]: a small transformer whose mean is projected."""

    def __init__(self, vocab_size: int, width: int, joint: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(MAX_TEXT, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, joint)

    def forward(self, token_ids: Tensor) -> Tensor:
        padded = token_ids == 0
        hidden = self.embedding(token_ids) + self.position[: token_ids.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=padded).masked_fill(padded[..., None], 0.0)
        return self.head(hidden.sum(1) / (~padded).sum(1, keepdim=True))  # type: ignore[no-any-return]


class ImageHead(nn.Module):
    """Grids [N, T, P, E] to the joint space [N, J]: a resampler like the bridge's, its latents projected."""

    def __init__(self, config: ModelConfig, joint: int) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(config)
        self.out = nn.Linear(config.resampler.num_latents * config.resampler.width, joint)
        with torch.no_grad():
            self.resampler.get_parameter("time_embeddings").mul_(0.02)
            for name, parameter in self.resampler.named_parameters():
                if name.endswith(("proj.weight", "ffw_up.weight", "ffw_down.weight")):
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)

    def forward(self, features_NTPE: Tensor) -> Tensor:
        weights = time_weights(features_NTPE.shape[1], len(self.resampler.get_parameter("time_embeddings")))
        latents = self.resampler(features_NTPE, torch.from_numpy(weights))
        return self.out(latents.flatten(1))  # type: ignore[no-any-return]


def image_batch(rng: np.random.Generator, size: int) -> list[pictures.Item]:
    """Training images: digits, shapes anywhere, and families of like scenes."""
    items = [pictures.digit(int(rng.integers(1 << 40)), split="train") for _ in range(round(size * DIGITS))]
    items += [pictures.roaming(rng) for _ in range(round(size * ROAMING))]
    while len(items) < size:
        things = pictures.draw_things(rng, num_groups=1 if rng.random() < 0.5 else 2, split="train")
        family = [things]
        while len(family) < VARIANTS:
            varied = pictures.vary(rng, family[int(rng.integers(len(family)))])
            if not pictures.is_test(sorted(thing.describe() for thing in varied)):
                family.append(varied)
        items += [pictures.scene_of(rng, member) for member in family]
    return items[:size]


def clip_batch(rng: np.random.Generator, num_things: int) -> list[pictures.Item]:
    """Training videos of equal length: each of some things moving each way that is not held out."""
    num_frames = int(rng.integers(4, 9))
    items = []
    for _ in range(num_things):
        thing = pictures.lone_thing(rng)
        for direction in pictures.DIRECTIONS:
            if not pictures.is_test_motion(thing, direction):
                items.append(pictures.video_of(rng, thing, direction, num_frames))
    return items


def _batch(seed: int, step: int, size: int) -> list[pictures.Item]:
    rng = np.random.default_rng([seed, step])
    return clip_batch(rng, size // 30) if step % CLIPS_EVERY == CLIPS_EVERY - 1 else image_batch(rng, size)


def train_vision(
    config: ModelConfig, tokenizer: Tokenizer, *, steps: int, batch: int, seed: int, log: Callable[[str], None]
) -> nn.ModuleDict:
    """A trained vision encoder, and the resampler of its head, from which the bridge's starts."""
    torch.manual_seed(seed)
    joint = 128
    vision = make_vision_encoder(config.vision)
    text = TextEncoder(config.language_model.vocab_size, 128, joint)
    head = ImageHead(config, joint)
    temperature = nn.Parameter(torch.tensor(2.3))
    parameters = [*vision.parameters(), *text.parameters(), *head.parameters(), temperature]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.02)
    peak, warm_up, every = 2e-3, steps // 15, max(1, steps // 60)
    seen: dict[str, list[tuple[float, float]]] = {"images": [], "clips": []}
    tokenizer.enable_padding(length=MAX_TEXT)
    tokenizer.enable_truncation(MAX_TEXT)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # drawing a batch takes half as long as a step
        ahead = pool.submit(_batch, seed, 0, batch)
        for step in range(steps):
            items = ahead.result()
            ahead = pool.submit(_batch, seed, step + 1, batch)
            scale = min(1.0, (step + 1) / warm_up)
            if step > steps * 0.4:  # cosine over the rest: the run is short
                scale = 0.5 + 0.5 * float(np.cos(np.pi * (step - steps * 0.4) / (steps * 0.6)))
            optimizer.param_groups[0]["lr"] = peak * max(scale, 0.01)
            texts = [item.description for item in items]
            ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
            ids = ids[:, : int((ids != 0).sum(1).max())]
            features = vision(to_pixels([frame for item in items for frame in item.frames], config))
            image_side = F.normalize(head(features.unflatten(0, (len(items), -1))), dim=-1)
            text_side = F.normalize(text(ids), dim=-1)
            logits = image_side @ text_side.T * temperature.exp().clamp(max=50.0)
            number = {text: index for index, text in enumerate(texts)}
            kind = torch.tensor([number[text] for text in texts])
            same = (kind[:, None] == kind).float()
            target = same / same.sum(1, keepdim=True)  # images with the same description are all right answers
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            right = (same.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean().item()
            seen["clips" if len(items[0].frames) > 1 else "images"].append((loss.item(), right))
            if (step + 1) % every == 0 or step == steps - 1:
                for name, values in seen.items():
                    if values:
                        mean_loss, mean_right = np.mean(values[-every:], axis=0)
                        log(f"vision step {step + 1}/{steps} {name} loss {mean_loss:.3f} retrieval {mean_right:.3f}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return nn.ModuleDict({"vision_encoder": vision, "resampler": head.resampler}).eval()
