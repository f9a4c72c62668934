"""Few-shot generation against transformers' IDEFICS at equal sizes, on the CPU.

    python benchmarks/idefics_cpu.py [--threads 2] [--runs 5] [--save]

Both: 12 layers of 768 with a gated layer before each, vocabulary 32k, 64 latents of 768 an image, random fp32 weights, vision encoders too
small to count. 8 images, a prompt of 512 tokens, 3 beams and 1; every run has new images and a new prompt, the two take turns.
transformers' step is (time for N + 1 tokens - time for 1 token) / N. Also shown: our second question about the same images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from flamingo_export.api import load

IMAGES, PROMPT, TOKENS = 8, 512, 12


def idefics(threads: int) -> Any:
    """transformers' model of the same sizes: SwiGLU of 2048 has as many parameters as our feed-forward of 3072."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = IdeficsConfig(
        vocab_size=32000,
        additional_vocab_size=0,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        cross_layer_interval=1,
        alpha_initializer="ones",
        use_resampler=True,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        vision_config={
            "embed_dim": 768,
            "image_size": 32,
            "patch_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 12,
            "intermediate_size": 64,
        },
        perceiver_config={"resampler_n_latents": 64, "resampler_depth": 1, "resampler_n_heads": 12, "resampler_head_dim": 64},
    )
    return IdeficsForVisionText2Text(config).eval()


def idefics_seconds(model: Any, seed: int, beams: int, tokens: int) -> float:
    """Time of one `generate` of exactly `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 32000, (1, PROMPT), generator=generator)
    pixels = torch.randn(1, IMAGES, 3, 32, 32, generator=generator)
    image_of = torch.arange(PROMPT) // (PROMPT // IMAGES)
    mask = torch.nn.functional.one_hot(image_of, IMAGES)[None]
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_attention_mask=mask,
            num_beams=beams,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
    return time.perf_counter() - started


def prompt(seed: int) -> tuple[list[int], list[np.ndarray[Any, Any]]]:
    """Token ids with an `<image>` every 64, and the images."""
    random = np.random.default_rng(seed)
    ids = random.integers(10, 32000, PROMPT)
    ids[:: PROMPT // IMAGES] = 3
    return ids.tolist(), [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(IMAGES)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/idefics_cpu.json")
    arguments = parser.parse_args()
    theirs = idefics(arguments.threads)
    config = common.model_config("idefics-size", layers=12, width=768, heads=12, every=1)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, load(common.bundle(config, Path(folder)), threads=arguments.threads) as ours:
        for beams in (3, 1):
            first, step, again = [], [], []
            their_first, their_step = [], []
            for run in range(arguments.runs + 1):  # the first is to warm up
                seed = 1000 * beams + run
                one = idefics_seconds(theirs, seed, beams, 1)
                many = idefics_seconds(theirs, seed, beams, TOKENS + 1)
                ids, images = prompt(seed)
                started = time.perf_counter()
                result = ours.generate(ids, images=images, beams=beams, max_new_tokens=TOKENS + 1)
                total = time.perf_counter() - started
                second = ours.generate([*ids[:-8], *ids[-16:-8]], images=images, beams=beams, max_new_tokens=2)
                if run == 0:
                    continue
                their_first.append(one)
                their_step.append((many - one) / TOKENS)
                first.append(total - sum(result.timings.steps))
                step.append(float(np.median(result.timings.steps)))
                again.append(second.timings.first_token)
            rows[f"{beams} beams"] = {
                "first token, ours": float(np.median(first)),
                "first token, transformers": float(np.median(their_first)),
                "step, ours": float(np.median(step)),
                "step, transformers": float(np.median(their_step)),
                "second question, ours": float(np.median(again)),
            }
    for name, row in rows.items():
        print(name)
        for label, value in row.items():
            print(f"  {label}: {value * 1e3:.1f} ms")
        print(f"  step: {row['step, transformers'] / row['step, ours']:.2f} times as fast")
        print(f"  first token: {row['first token, transformers'] / row['first token, ours']:.2f} times as fast")
        print(
            f"  second question about the same images: {row['first token, ours'] / row['second question, ours']:.1f} times sooner"
        )
    if arguments.save:
        print(common.save("idefics_cpu", {"threads": arguments.threads, "seconds": rows}))


if __name__ == "__main__":
    main()
