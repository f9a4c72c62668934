"""Decoder of about 110M parameters on the CPU in fewer bits: int8 and int4 against fp32, in one run.

    python benchmarks/quantized_cpu.py [--threads 2] [--rounds 60] [--save]

The decoder, cache and steps of decoder_cpu.py. All take turns; the floor of each is its own bytes over the best of several readers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
from decoder_cpu import bytes_a_step, engine

POLICIES = ("fp32", "int8", "int4")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/quantized_cpu.json")
    arguments = parser.parse_args()
    config = common.model_config("decoder-110m", layers=12, width=768, heads=12, every=12)
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in POLICIES:
            bundle = common.bundle(config, Path(folder) / name, policy=None if name == "fp32" else name)
            sizes[name] = bytes_a_step(config, bundle)
            for beams in (1, 3):
                calls[f"{name}, {beams}"] = engine(config, bundle, beams, arguments.threads)
        before = common.read_bandwidth(arguments.threads)
        times = common.interleaved(calls, rounds=arguments.rounds)
        bandwidth = max(before, common.read_bandwidth(arguments.threads))
    floors = {name: size / bandwidth for name, size in sizes.items()}
    for name, value in times.items():
        floor = floors[name.split(",")[0]]
        print(f"{name} beams: {value * 1e3:.1f} ms per step, {floor / value:.0%} of its floor ({floor * 1e3:.1f} ms)")
    ratios = {
        f"{name} over fp32, {beams} beams": times[f"fp32, {beams}"] / times[f"{name}, {beams}"]
        for name in POLICIES[1:]
        for beams in (1, 3)
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times the tokens per second")
    if arguments.save:
        result = {
            "milliseconds": {name: value * 1e3 for name, value in times.items()},
            "floor_ms": {name: value * 1e3 for name, value in floors.items()},
            "ratios": ratios,
        }
        print(common.save("quantized_cpu", {"threads": arguments.threads, **result}))


if __name__ == "__main__":
    main()
