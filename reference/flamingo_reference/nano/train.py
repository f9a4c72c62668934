"""Trains the nano checkpoint: `python -m flamingo_reference.nano.train [--out FOLDER]`.

Stages, each saved when finished and skipped when found: tokenizer, vision (contrastive), language (text only), bridge (resampler and
gated cross-attention, everything else frozen). Seeded; on two quiet cores about an hour (the log records wall and processor time).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from flamingo_reference.config import NANO, ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.nano.train_tokenizer import load_tokenizer, train_tokenizer

STAGES = ("tokenizer", "vision", "language", "bridge")
SEED = 20220429  # the day the paper appeared


class Run:
    """A training run's folder: finished stages and the log."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def log(self, text: str) -> None:
        """Prints a line and appends it to `train.log`."""
        print(text, flush=True)
        with (self.folder / "train.log").open("a") as file:
            file.write(text + "\n")

    def stage(self, name: str, module: nn.Module, train: Callable[[], nn.Module]) -> None:
        """Loads `module` from a finished stage, or trains and saves it."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            wall, cpu = time.monotonic(), time.process_time()
            trained = train()
            save_file(trained.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
            self.log(
                f"{name}: {(time.monotonic() - wall) / 60:.1f} min, {(time.process_time() - cpu) / 60:.1f} min of processor time"
            )
        module.load_state_dict(load_file(path))


def train(folder: Path, *, config: ModelConfig = NANO, until: str = "bridge") -> Flamingo | None:
    """Runs the stages up to `until`; the finished model, or None where the bridge was not asked for."""
    from flamingo_reference.nano import language, train_bridge, train_vision

    run = Run(folder)
    tokenizer = _tokenizer(folder / "tokenizer.json", config)
    model = Flamingo(config)
    last = STAGES.index(until)
    if last >= STAGES.index("vision"):
        run.stage(
            "vision",
            nn.ModuleDict({"vision_encoder": model.vision_encoder, "resampler": model.resampler}),
            lambda: train_vision.train_vision(config, tokenizer, steps=6000, batch=120, seed=SEED, log=run.log),
        )
    if last >= STAGES.index("language"):
        run.stage(
            "language",
            model.language_model,
            lambda: language.train_language(config, tokenizer, steps=800, seed=SEED, log=run.log),
        )
    if last < STAGES.index("bridge"):
        return None
    unfinished = folder / "unfinished"
    run.stage(
        "bridge",
        model,
        lambda: train_bridge.train_bridge(
            model,
            tokenizer,
            steps=2400,
            seed=SEED,
            log=run.log,
            keep=lambda model: model.save(unfinished, tokenizer=folder / "tokenizer.json"),
        ),
    )
    model.save(folder / "checkpoint", tokenizer=folder / "tokenizer.json")
    return model.eval()


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    if not path.exists():
        train_tokenizer(config.language_model.vocab_size).save(str(path))
    return load_tokenizer(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder for stages, log and checkpoint")
    parser.add_argument("--until", choices=STAGES, default="bridge", help="last stage to run")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, until=arguments.until)


if __name__ == "__main__":
    main()
