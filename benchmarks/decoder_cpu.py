"""Decoder of about 110M parameters on the CPU: ONNX Runtime against the memory floor, eager PyTorch and torch.compile.

    python benchmarks/decoder_cpu.py [--threads 2] [--rounds 60] [--save]

12 layers of 768, 12 heads, vocabulary 32k, relative positions, 512 tokens cached, fp32; steps of 1 beam and 3 beams. The rivals have a
cache allocated beforehand, written in place, and the same table of projected distances. All take turns in one run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig

CACHED, CAPACITY = 512, 640


class Rival:
    """The same decoder step in plain PyTorch, on the bundle's own weights, its cache written in place."""

    def __init__(self, config: ModelConfig, bundle: Path, beams: int) -> None:
        index = WeightIndex.read(bundle)
        self.weights = {
            name: torch.from_numpy(np.array(index.read_tensor(bundle, name))) for name in index if name.startswith("decoder")
        }
        self.config, self.beams = config, beams
        lm, block = config.language_model, config.cross_attention
        # A tensor of its own for each layer, written whole by index_copy_: of one large tensor the compiler would copy all at each write.
        self.keys, self.values = (
            [torch.randn(1, lm.num_heads, CAPACITY, lm.head_size) for _ in range(lm.num_layers)] for _ in range(2)
        )
        self.media = torch.randn(2, 1, block.num_heads, config.resampler.num_latents, block.head_size)
        self.slots = torch.arange(CACHED, CACHED + beams)
        visible = torch.zeros(1, 1, beams, CAPACITY, dtype=torch.bool)
        visible[..., :CACHED] = True
        visible[..., CACHED : CACHED + beams] = torch.eye(beams, dtype=torch.bool)
        self.mask = torch.where(visible, 0.0, -30000.0)
        distance = (CACHED - torch.arange(CAPACITY)).clamp(0, CAPACITY - 1)
        self.distance = distance.expand(1, lm.num_heads, beams, CAPACITY)
        self.tokens = torch.zeros(1, beams, dtype=torch.int64) + 7
        self.forward: Callable[[Tensor], Tensor] = self.step

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self.forward(self.tokens)

    def step(self, tokens: Tensor) -> Tensor:
        lm = self.config.language_model
        w, heads = self.weights, (lm.num_heads, lm.head_size)
        x = F.embedding(tokens, w["decoder/embedding"])
        for layer in range(lm.num_layers):
            name = f"decoder/layer.{layer}"
            if layer in self.config.gated_layers:
                x = self._gated(f"{name}/cross_attention", x)
            normed = F.rms_norm(x, (lm.width,), w[f"{name}/attention_norm/weight"], lm.norm_eps)
            q, k, v = (normed @ w[f"{name}/self_attention/qkv_proj"]).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in (q, k, v))
            self.keys[layer].index_copy_(2, self.slots, k)
            self.values[layer].index_copy_(2, self.slots, v)
            table = w[f"{name}/self_attention/distances"].flatten(2)[:, :, :CAPACITY]
            bias = ((q + w[f"{name}/self_attention/position_bias"]) @ table).gather(-1, self.distance) + self.mask
            query = q + w[f"{name}/self_attention/content_bias"]
            seen = F.scaled_dot_product_attention(query, self.keys[layer], self.values[layer], attn_mask=bias)
            x = x + seen.transpose(1, 2).flatten(2) @ w[f"{name}/self_attention/out_proj"]
            normed = F.rms_norm(x, (lm.width,), w[f"{name}/ffw_norm/weight"], lm.norm_eps)
            x = x + F.gelu(normed @ w[f"{name}/ffw_up"]) @ w[f"{name}/ffw_down"]
        return F.linear(F.rms_norm(x, (lm.width,), w["decoder/norm/weight"], lm.norm_eps), w["decoder/embedding"])

    def _gated(self, name: str, x: Tensor) -> Tensor:
        block, w, width = self.config.cross_attention, self.weights, self.config.language_model.width
        normed = F.layer_norm(x, (width,), w[f"{name}/norm/weight"], w[f"{name}/norm/bias"])
        q = (normed @ w[f"{name}/q_proj"]).unflatten(-1, (block.num_heads, block.head_size)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(q, self.media[0], self.media[1]).transpose(1, 2).flatten(2)
        x = x + seen @ w[f"{name}/out_proj"]
        normed = F.layer_norm(x, (width,), w[f"{name}/ffw_norm/weight"], w[f"{name}/ffw_norm/bias"])
        return x + F.relu(normed @ w[f"{name}/ffw_up"]).square() @ w[f"{name}/ffw_down"]


def engine(config: ModelConfig, bundle: Path, beams: int, threads: int) -> Callable[[], object]:
    """A decoder step of our engine, cache and media bound, everything else fed."""
    manifest = read_manifest(bundle)
    session = get_backend("onnxruntime").open(bundle, manifest, manifest.graph("decoder"), SessionOptions(threads=threads))
    lm, block, spec = config.language_model, config.cross_attention, session.spec
    for tensor in spec.inputs:
        if tensor.name.startswith("past"):
            session.bind(tensor.name, session.allocate(tensor.name, (1, lm.num_heads, CAPACITY, lm.head_size)))
        if tensor.name.startswith("media_") and tensor.name != "media_rows":
            shape = (8, block.num_heads, config.resampler.num_latents, block.head_size)
            session.bind(tensor.name, session.allocate(tensor.name, shape))
    mask = np.zeros((1, 1, beams, CAPACITY), bool)
    mask[..., :CACHED] = True
    mask[0, 0, :, CACHED : CACHED + beams] = np.eye(beams, dtype=bool)
    positions = np.minimum(np.arange(CAPACITY), CACHED)[None]
    feeds = {
        "token_ids": np.full((1, beams), 7),
        "positions": np.full((1, beams), CACHED),
        "media_rows": np.zeros((1, 1), np.int64),
        "phi": np.ones((1, beams), np.int64),
        "write_index": np.full(1, CACHED),
        "mask": mask,
        "key_positions": positions,
        "logit_positions": np.arange(beams)[None],
    }
    return lambda: session.run(feeds)


def bytes_a_step(config: ModelConfig, bundle: Path) -> int:
    """Weight bytes that a step must read: all of the decoder's, of the tables of distances only what the cache covers, of the embedding
    only where it is the head as well."""
    index, lm = WeightIndex.read(bundle), config.language_model
    total = 0
    for name in index:
        if name.startswith("decoder") and not (name == "decoder/embedding" and "decoder/head" in index):
            table = name.endswith("/distances")
            total += index[name].length * CAPACITY // lm.max_positions if table else index[name].length
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/decoder_cpu.json")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = common.model_config("decoder-110m", layers=12, width=768, heads=12, every=12)
    with tempfile.TemporaryDirectory() as folder:
        bundle = common.bundle(config, Path(folder))
        size = bytes_a_step(config, bundle)
        calls: dict[str, Callable[[], object]] = {}
        for beams in (1, 3):
            calls[f"onnxruntime, {beams}"] = engine(config, bundle, beams, arguments.threads)
            calls[f"eager, {beams}"] = Rival(config, bundle, beams)
            if not arguments.no_compile:
                compiled = Rival(config, bundle, beams)
                compiled.forward = torch.compile(compiled.step)
                calls[f"compiled, {beams}"] = compiled
        before = common.read_bandwidth(arguments.threads)
        times = common.interleaved(calls, rounds=arguments.rounds)
        bandwidth = max(before, common.read_bandwidth(arguments.threads))
    floor = size / bandwidth
    print(f"weights read a step: {size / 1e6:.1f} MB; read bandwidth {bandwidth / 1e9:.1f} GB/s; floor {floor * 1e3:.1f} ms")
    for name, value in times.items():
        print(f"{name} beams: {value * 1e3:.1f} ms, {floor / value:.0%} of the floor")
    ratios = {
        "share of the memory floor, 1 beam": floor / times["onnxruntime, 1"],
        "3 beams over 1 beam": times["onnxruntime, 3"] / times["onnxruntime, 1"],
        "eager over onnxruntime, 1 beam": times["eager, 1"] / times["onnxruntime, 1"],
        "eager over onnxruntime, 3 beams": times["eager, 3"] / times["onnxruntime, 3"],
    }
    if "compiled, 1" in times:
        ratios |= {
            f"compiled over onnxruntime, {n} beams": times[f"compiled, {n}"] / times[f"onnxruntime, {n}"] for n in (1, 3)
        }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if arguments.save:
        result = {
            "milliseconds": {name: value * 1e3 for name, value in times.items()},
            "floor_ms": floor * 1e3,
            "ratios": ratios,
        }
        print(common.save("decoder_cpu", {"threads": arguments.threads, **result}))


if __name__ == "__main__":
    main()
