"""What files as they are published have in common."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from openflamingo_models import Theirs
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from flamingo_export.sources.choice import CheckpointFolder


def write_tokenizer(folder: Path, words: list[str], special: list[str]) -> None:
    """Words parted by spaces; the special ones are added tokens of the ids that they have among the words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_openflamingo(folder: Path, theirs: Theirs, *, layout: str = "openai") -> CheckpointFolder:
    """checkpoint.pt as training saved it, the language model's folder with a tokenizer that lacks the added tokens, CLIP's file."""
    lm = folder / "lm"
    lm.mkdir(parents=True)
    trained = {f"module.{name}": torch.from_numpy(array.copy()).float() for name, array in theirs.checkpoint().items()}
    torch.save(
        {"epoch": 9, "model_state_dict": trained, "optimizer_state_dict": {"state": {0: torch.ones(3)}}},
        folder / "checkpoint.pt",
    )
    save_file(
        {name: np.ascontiguousarray(array, np.float32) for name, array in theirs.language_model().items()},
        lm / "model.safetensors",
    )
    (lm / "config.json").write_text(json.dumps(theirs.language_model_config()))
    bos = ["<s>"] if theirs.kind == "llama" else []
    write_tokenizer(lm, ["<unk>", *(bos or ["w1"]), *(f"w{index}" for index in range(2, 61))], bos)
    clip = {name: torch.from_numpy(np.array(array)).float() for name, array in theirs.vision(layout).items()}
    if layout == "openai":
        # Sizes that OpenAI's own file holds as tensors.
        clip |= {
            name: torch.tensor(size)
            for name, size in {"input_resolution": 28, "context_length": 77, "vocab_size": 49408}.items()
        }
        torch.save(clip, folder / "ViT-L-14.pt")
        return CheckpointFolder(path=folder / "checkpoint.pt", language_model=lm, vision_encoder=folder / "ViT-L-14.pt")
    (folder / "clip").mkdir()
    save_file({name: tensor.numpy() for name, tensor in clip.items()}, folder / "clip" / "model.safetensors")
    raw = theirs.clip.config.to_dict()
    (folder / "clip" / "config.json").write_text(json.dumps(raw))
    return CheckpointFolder(path=folder / "checkpoint.pt", language_model=lm, vision_encoder=folder / "clip")
