"""Trains nano's contrastive encoder against its shipped, frozen vision weights: `python -m flamingo_reference.nano.towers --out FOLDER`.

The text encoder of the contrastive stage was thrown away (contrastive.py). This one is trained anew, with an image head that reads the grid, on
features that are computed once: nothing of the model changes. Seeded; minutes on one core. The checkpoint in FOLDER is the shipped one with the
new tensors.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from flamingo_reference.checkpoints.files.folder import TOWERS as TOWERS_PREFIX
from flamingo_reference.checkpoints.files.folder import TOWERS_NAME
from flamingo_reference.config import NANO, ModelConfig
from flamingo_reference.contrastive_config import ContrastiveConfig, Readout, TextConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.model.contrastive import Contrastive, pooled_of
from flamingo_reference.nano import pictures
from flamingo_reference.nano.batches import to_pixels
from flamingo_reference.nano.pictures import Item
from flamingo_reference.nano.train_tokenizer import load_tokenizer

SEED = 20220430
MOST_TOKENS = 48
TOWERS = ContrastiveConfig(
    joint_width=128,
    pooling=Readout(num_latents=8, width=96, num_layers=2, num_heads=4, head_size=24, ffw_width=192),
    text=TextConfig(
        num_layers=2,
        width=96,
        num_heads=4,
        ffw_width=192,
        vocab_size=NANO.language_model.vocab_size,
        max_positions=MOST_TOKENS,
        activation="gelu",
        causal=False,
        pooling="mean",
    ),
)
"""Every choice is ours. Tokens are those of the language model, which have no token that ends a text, so a text is read by its mean."""
FAMILIES, VARIANTS = 3000, 6
"""Scenes come in families that differ in one attribute of one thing each: hard negatives, side by side in a batch."""
DIGIT_VIEWS = 3
"""Renderings of each training scan."""
STEPS, FAMILIES_AT_ONCE, DIGITS_AT_ONCE = 2500, 36, 40


def texts_of(item: Item) -> tuple[str, ...]:
    """What is true of an item: its caption, and where there is more to say the description."""
    return tuple(dict.fromkeys((item.caption, item.description)))


def training_items(seed: int) -> tuple[list[Item], list[Item]]:
    """Families of scenes one after the other, and digits."""
    rng = np.random.default_rng([seed, 1])
    scenes: list[Item] = []
    for _ in range(FAMILIES):
        family = [pictures.draw_things(rng, num_groups=1 if rng.random() < 0.6 else 2, split="train")]
        while len(family) < VARIANTS:
            varied = pictures.vary(rng, family[int(rng.integers(len(family)))])
            if not pictures.is_test(sorted(thing.describe() for thing in varied)):
                family.append(varied)
        scenes += [pictures.scene_of(rng, things) for things in family]
    count = len(pictures.scan_indices("train"))
    digits = [pictures.digit(view * count + index, split="train") for view in range(DIGIT_VIEWS) for index in range(count)]
    return scenes, digits


@torch.no_grad()
def features_of(model: Flamingo, items: list[Item]) -> Tensor:
    """Features [N, P, E] of images."""
    found = []
    for start in range(0, len(items), 100):
        frames = [item.frames[0] for item in items[start : start + 100]]
        found.append(model.vision_encoder(to_pixels(frames, model.config)))
    return torch.cat(found)


def encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """token_ids [B, S], padded at the end, and lengths [B]."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    lengths = torch.tensor([len(each) for each in ids])
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, each in zip(padded, ids, strict=True):
        row[: len(each)] = torch.tensor(each)
    return padded, lengths


def train_towers(model: Flamingo, tokenizer: Tokenizer, *, seed: int = SEED) -> Contrastive:
    """A trained contrastive encoder for a model that has none; the model is left as it is."""
    config = with_towers(model.config)
    scenes, digits = training_items(seed)
    seen, known = features_of(model, scenes), features_of(model, digits)
    torch.manual_seed(seed)
    towers = Contrastive(config)
    _begin(towers)
    assert towers.text is not None
    assert towers.logit_scale is not None
    optimizer = torch.optim.AdamW(towers.parameters(), lr=0.0, weight_decay=0.02)
    rng = np.random.default_rng([seed, 2])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = (
            2e-3 * min(1.0, (step + 1) / 150) * (0.51 + 0.49 * float(np.cos(np.pi * step / STEPS)))
        )
        families = rng.choice(FAMILIES, FAMILIES_AT_ONCE, replace=False)
        rows = (families[:, None] * VARIANTS + np.arange(VARIANTS)).reshape(-1)
        others = rng.choice(len(digits), DIGITS_AT_ONCE, replace=False)
        items = [*(scenes[row] for row in rows), *(digits[row] for row in others)]
        features = torch.cat([seen[torch.from_numpy(rows)], known[torch.from_numpy(others)]])
        choices = [texts_of(item) for item in items]
        # The description holds all that tells a family's scenes apart; captions are how people ask.
        texts = [own[-1] if rng.random() < 0.6 else own[0] for own in choices]
        images = towers.image(pooled_of(features, towers.readout))
        of_texts = towers.text(*encoded(tokenizer, texts))
        logits = images @ of_texts.T * towers.logit_scale.exp().clamp(max=100.0)
        true = torch.tensor([[text in own for text in texts] for own in choices]).float()
        loss = (_against(logits, true) + _against(logits.T, true.T)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            right = true.gather(1, logits.argmax(1, keepdim=True)).mean().item()
            print(f"step {step + 1}/{STEPS} loss {loss.item():.3f} right {right:.3f}", flush=True)
    with torch.no_grad():
        towers.logit_scale.clamp_(max=float(np.log(100.0)))
    return towers.requires_grad_(False).eval()


def _against(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy where several answers are right alike."""
    return F.cross_entropy(logits, true / true.sum(1, keepdim=True))


def _begin(towers: Contrastive) -> None:
    """Numbers to start from where PyTorch's are of no use."""
    assert towers.text is not None
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if name.endswith("embedding.weight"):
                parameter.normal_(0.0, 0.05)
            elif name.endswith(("proj.weight", "ffw_up.weight", "ffw_down.weight")):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)


def with_towers(config: ModelConfig) -> ModelConfig:
    """Nano with its contrastive encoder."""
    return msgspec.structs.replace(config, contrastive=TOWERS)


def save(towers: Contrastive, config: ModelConfig, checkpoint: Path, out: Path) -> None:
    """The checkpoint with the towers in a file beside the model's, which is copied as it is."""
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != checkpoint.resolve():
        shutil.copyfile(checkpoint / "model.safetensors", out / "model.safetensors")
        shutil.copytree(checkpoint / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    tensors = {f"{TOWERS_PREFIX}{name}": tensor.contiguous() for name, tensor in towers.state_dict().items()}
    save_file(tensors, out / TOWERS_NAME)
    (out / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(with_towers(config)), indent=1) + b"\n")


def main() -> None:
    """The command line."""
    shipped = Path(__file__).parent / "checkpoint"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=shipped, help="nano, whose vision weights are used")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint with towers")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wall, cpu = time.monotonic(), time.process_time()
    model = Flamingo.from_checkpoint(arguments.checkpoint).requires_grad_(False).eval()
    if model.config.contrastive is not None:  # trained anew: the model is the same
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("contrastive.")}
        model = Flamingo(msgspec.structs.replace(model.config, contrastive=None)).requires_grad_(False).eval()
        model.load_state_dict(state)
    towers = train_towers(model, load_tokenizer(arguments.checkpoint / "tokenizer" / "tokenizer.json"))
    save(towers, model.config, arguments.checkpoint, arguments.out)
    print(f"{(time.monotonic() - wall) / 60:.1f} min, {(time.process_time() - cpu) / 60:.1f} min of processor time")


if __name__ == "__main__":
    main()
