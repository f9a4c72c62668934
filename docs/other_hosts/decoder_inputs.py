"""Inputs of a bundle's decoder that are in range, for Polygraphy. Run in the bundle's folder:

    polygraphy run decoder.onnx --onnxrt --data-loader-script decoder_inputs.py

One request of 8 tokens about one image, in an empty cache of 32 slots; the second call decodes one token after them.
"""

import json
from pathlib import Path

import numpy as np

TOKENS, SLOTS = 8, 32


def load_data():
    """Yields the feeds of each call, by the inputs' names."""
    config = json.loads(Path("manifest.json").read_text())["config"]
    lm, block = config["language_model"], config["cross_attention"]
    gated = range(block["offset"], lm["num_layers"], block["every"])
    rng = np.random.default_rng(0)
    bank = (1, block["num_heads"], config["resampler"]["num_latents"], block["head_size"])
    cache = (1, lm["num_kv_heads"] or lm["num_heads"], SLOTS, lm["head_size"])
    distances = lm["positions"]["type"] in ("relative", "alibi")
    for start, count in ((0, TOKENS), (TOKENS, 1)):
        positions = np.arange(start, start + count)
        ids = rng.integers(0, lm["vocab_size"], (1, count))
        ids[0, 0] = config["tokens"]["image"] if start == 0 else ids[0, 0]
        feeds = {
            "token_ids": ids,
            "positions": positions[None],
            "media_rows": np.zeros((1, 1), np.int64),
            "phi": np.ones((1, count), np.int64),
            "write_index": np.array([start]),
            "mask": (np.arange(SLOTS) <= positions[:, None])[None, None],
            "logit_positions": np.array([[count - 1]]),
        }
        if distances:
            feeds["key_positions"] = np.arange(SLOTS)[None]
        for i, _ in enumerate(gated):
            feeds |= {f"media_{kind}.{i}": rng.normal(size=bank).astype(np.float32) for kind in "kv"}
        for layer in range(lm["num_layers"]):
            feeds |= {f"past_{kind}.{layer}": np.zeros(cache, np.float32) for kind in "kv"}
        yield feeds
