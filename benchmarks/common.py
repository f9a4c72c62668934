"""What the benchmarks share: a bundle of random weights, the memory floor, interleaved timing, results as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_reference.config import (
    CrossAttentionConfig,
    LanguageModelConfig,
    ModelConfig,
    NFNetConfig,
    ResamplerConfig,
    TokenIds,
)

RESULTS = Path(__file__).parent / "results"


def model_config(
    name: str, *, layers: int, width: int, heads: int, every: int, vocab_size: int = 32000, max_positions: int = 2048
) -> ModelConfig:
    """A decoder of the asked size behind a vision encoder so small that it does not count; 64 latents as wide as the decoder."""
    return ModelConfig(
        name=name,
        vision=NFNetConfig(
            image_size=32, widths=(16,), depths=(1,), stem_widths=(8, 8, 8, 16), feature_width=32, group_width=8
        ),
        resampler=ResamplerConfig(num_layers=1, width=width, num_heads=heads, head_size=width // heads, ffw_width=width),
        cross_attention=CrossAttentionConfig(every=every, num_heads=heads, head_size=width // heads, ffw_width=4 * width),
        language_model=LanguageModelConfig(
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_size=width // heads,
            ffw_width=4 * width,
            vocab_size=vocab_size,
            max_positions=max_positions,
        ),
        tokens=TokenIds(pad=0, bos=1, eoc=2, image=3),
    )


def bundle(config: ModelConfig, folder: Path, *, policy: str | None = None) -> Path:
    """A bundle of seeded random weights in fp32, or quantised by a preset."""
    from flamingo_export.pipeline.build_request import BuildRequest
    from flamingo_export.pipeline.run import build
    from flamingo_export.quantize.policies import preset
    from flamingo_export.sources.choice import RandomWeights

    out = folder / f"{config.name}.bundle"
    if not out.exists():
        request = BuildRequest(
            source=RandomWeights(config=config, seed=0),
            out=out,
            storage="fp32",
            policy=preset(policy) if policy is not None else None,
            uncalibrated=policy is not None,
            parity="skip",
        )
        build(request)
    return out


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory: the best of several readers of 512 MB, in turn."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(128 << 20, dtype=torch.float32)
    matrix, vector = numbers.view(-1, 4096), torch.ones(4096)
    readers: list[Callable[[], Any]] = [
        numbers.sum,
        numbers.max,
        lambda: matrix @ vector,
        lambda: torch.dot(numbers, numbers) / 2,
    ]
    best = min(seconds(reader) for _ in range(3) for reader in readers)
    return numbers.numel() * 4 / best


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that a machine that changes pace changes it for all."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: float(np.median(values)) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """Processor, versions and commit that a result belongs to."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model
        )
    versions = {}
    for package in ("flamingo-export", "onnxruntime", "torch", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return {"processor": model, "versions": versions, "commit": commit.stdout.strip() or None}


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Writes `results/NAME.json` with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path
