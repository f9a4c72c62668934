"""9b in int4 on the CPU: time to the first token with 4 images, time per step, and the memory floor.

    python benchmarks/quantized_real.py BUNDLE [--threads 0] [--tokens 12] [--rounds 4] [--save]

BUNDLE: `flamingo-export build --size 9b --int4 --parity skip`. The floor is what a step must read (the decoder's codes and scales, of the
tables of distances what the cache covers) over the best of several readers of memory. Beams and readers take turns; the first
token is that of the first turn, with images that the bundle has not seen.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import common
import numpy as np

from flamingo_export import api
from flamingo_export.machine import physical_cores
from flamingo_export.weights import WeightIndex

IMAGES = 4


def bytes_a_step(bundle: Path, capacity: int, max_positions: int) -> int:
    """Weight bytes that a step must read."""
    index = WeightIndex.read(bundle)
    total = 0
    for name in index:
        if name.startswith("decoder/") and name != "decoder/embedding":
            share = min(1.0, capacity / max_positions) if name.endswith("/distances") else 1.0
            total += int(share * index[name].length)
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/quantized_real.json")
    arguments = parser.parse_args()
    threads = arguments.threads or physical_cores()
    bandwidth = common.read_bandwidth(threads)
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    with api.load(arguments.bundle, backend="onnxruntime", threads=threads) as model:
        loaded = time.perf_counter() - started
        side, config = model.config.vision.image_size, model.config.language_model
        prompt = "<image>Output: two cats.<image>Output: a boat.<image>Output: a red bus.<image>Output:"
        seen = {beams: [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(IMAGES)] for beams in (1, 3)}
        found: dict[str, dict[str, float]] = {}
        steps: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for beams, images in seen.items():
                timings = model.generate(prompt, images=images, beams=beams, max_new_tokens=arguments.tokens).timings
                name = f"{beams} beams"
                steps[name] = [*steps.get(name, []), *timings.steps]
                if name not in found:
                    found[name] = {
                        "first_token_s": timings.prepare + timings.media + timings.prefill,
                        "media_s": timings.media,
                        "prefill_s": timings.prefill,
                        "prompt_tokens": timings.prompt_tokens,
                    }
            bandwidth = max(bandwidth, common.read_bandwidth(threads))
        for name, times in steps.items():
            found[name]["step_s"] = float(np.median(times))
        capacity = model.engine.loop.cache.capacity
    size = bytes_a_step(arguments.bundle, capacity, config.max_positions)
    floor = size / bandwidth
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{arguments.bundle}: opened in {loaded:.0f} s, {memory / 2**30:.1f} GiB at most")
    print(
        f"a step reads {size / 1e9:.2f} GB, its cache {capacity} slots; {bandwidth / 1e9:.1f} GB/s; floor {floor * 1e3:.0f} ms"
    )
    for name, each in found.items():
        print(
            f"{name}: first token {each['first_token_s']:.1f} s ({IMAGES} images {each['media_s']:.1f}, {each['prompt_tokens']} tokens "
            f"{each['prefill_s']:.1f}), then {each['step_s'] * 1e3:.0f} ms per step ({1 / each['step_s']:.2f} per second), "
            f"{floor / each['step_s']:.0%} of the floor"
        )
    if arguments.save:
        shares = {name: floor / each["step_s"] for name, each in found.items()}
        result = {"open_s": loaded, "peak_bytes": memory, "bytes_a_step": size, "bandwidth": bandwidth, "floor_s": floor}
        print(common.save("quantized_real", {"threads": threads, **result, "runs": found, "share_of_floor": shares}))


if __name__ == "__main__":
    main()
