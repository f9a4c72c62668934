"""Generation against transformers' IDEFICS on the CPU: one model, one set of weights, both.

    python benchmarks/idefics_cpu.py [--threads 2] [--runs 5] [--save]

12 layers of 768 with a gated layer before each, vocabulary 32k, 64 latents an image, random fp32 weights, a vision encoder too small to count.
transformers writes the checkpoint, the bundle is built of it. A prompt of 512 tokens with 1, 4 or 8 images, 1 and 3 beams; every run has new
images and a new prompt, the two take turns. A step of transformers is (time for N + 1 tokens - time for 1 token) / N. Also shown: our second
question about the same images, and in how many of the runs both generated the same tokens (random weights have near ties).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import flamingo_export
from flamingo_export.runtime.images import preprocess

PROMPT, TOKENS, SIDE, VOCABULARY = 512, 12, 32, 32000
IMAGES, BEAMS = (1, 4, 8), (1, 3)
IMAGE = VOCABULARY + 1
"""The second of the two tokens that IDEFICS adds."""


def idefics(layers: int = 12) -> Any:
    """transformers' model; its gates are ones, so that images count."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    torch.manual_seed(0)
    config = IdeficsConfig(
        vocab_size=VOCABULARY,
        additional_vocab_size=2,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        cross_layer_interval=1,
        qk_layer_norms=True,
        alpha_initializer="ones",
        use_resampler=True,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        vision_config={
            "embed_dim": 768,
            "image_size": SIDE,
            "patch_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 12,
            "intermediate_size": 64,
        },
        perceiver_config={"resampler_n_latents": 64, "resampler_depth": 1, "resampler_n_heads": 12, "resampler_head_dim": 64},
    )
    return IdeficsForVisionText2Text(config).eval()


def question(seed: int, images: int) -> tuple[list[int], list[np.ndarray[Any, Any]]]:
    """Token ids with the images' evenly between them, and the images."""
    random = np.random.default_rng(seed)
    ids = random.integers(10, VOCABULARY, PROMPT)
    ids[:: PROMPT // images] = IMAGE
    return ids.tolist(), [random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(images)]


def theirs(model: Any, config: Any, ids: list[int], images: list[Any], beams: int, tokens: int) -> tuple[float, list[int]]:
    """Seconds of a `generate` of exactly `tokens` tokens, preprocessing included as ours is, and the tokens."""
    started = time.perf_counter()
    pixels = torch.from_numpy(np.stack([preprocess(image, config, "stretch") for image in images]))[None]
    shown = torch.arange(PROMPT) // (PROMPT // len(images))
    with torch.inference_mode():
        found = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, PROMPT, dtype=torch.int64),
            pixel_values=pixels,
            image_attention_mask=torch.nn.functional.one_hot(shown.clamp(max=len(images) - 1), len(images))[None],
            num_beams=beams,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            suppress_tokens=[IMAGE],
        )
    return time.perf_counter() - started, found[0, PROMPT:].tolist()


def measured(model: Any, ours: Any, beams: int, images: int, runs: int) -> dict[str, float]:
    """Medians in seconds."""
    times: dict[str, list[float]] = {}
    equal = 0
    for run in range(runs + 1):
        ids, pictures = question(1000 * beams + 100 * images + run, images)
        one, _ = theirs(model, ours.config, ids, pictures, beams, 1)
        many, tokens = theirs(model, ours.config, ids, pictures, beams, TOKENS + 1)
        started = time.perf_counter()
        answer = ours.generate(ids, images=pictures, beams=beams, max_new_tokens=TOKENS + 1)
        total = time.perf_counter() - started
        again = ours.generate([*ids[:-8], *ids[-16:-8]], images=pictures, beams=beams, max_new_tokens=2)
        if run == 0:  # to warm up
            continue
        equal += list(answer.token_ids) == tokens
        row = {
            "first token, ours": total - sum(answer.timings.steps),
            "first token, transformers": one,
            "step, ours": float(np.median(answer.timings.steps)),
            "step, transformers": (many - one) / TOKENS,
            "second question, ours": again.timings.first_token,
        }
        for name, value in row.items():
            times.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in times.items()} | {"equal tokens": equal / runs}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/idefics_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = idefics()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "idefics")
        built = flamingo_export.build(Path(folder) / "idefics", out=Path(folder) / "b.bundle", storage="fp32", parity="skip")
        with flamingo_export.load(built.path, threads=arguments.threads) as ours:
            for beams, images in itertools.product(BEAMS, IMAGES):
                row = measured(model, ours, beams, images, arguments.runs)
                name = f"{beams} beam{'s' if beams > 1 else ''}, {images} image{'s' if images > 1 else ''}"
                rows[name] = row | {
                    "times as fast, step": row["step, transformers"] / row["step, ours"],
                    "times as fast, first token": row["first token, transformers"] / row["first token, ours"],
                }
                print(
                    f"{name}: first token {row['first token, ours'] * 1e3:.0f} ms, transformers "
                    f"{row['first token, transformers'] * 1e3:.0f}: {rows[name]['times as fast, first token']:.2f} times as fast; "
                    f"step {row['step, ours'] * 1e3:.1f} ms, transformers {row['step, transformers'] * 1e3:.1f}: "
                    f"{rows[name]['times as fast, step']:.2f} times as fast; second question "
                    f"{row['second question, ours'] * 1e3:.0f} ms; equal tokens in {row['equal tokens']:.0%}",
                    flush=True,
                )
    if arguments.save:
        print(common.save("idefics_cpu", {"threads": arguments.threads, "seconds": rows}))


if __name__ == "__main__":
    main()
