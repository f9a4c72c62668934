"""Memory of opening a bundle on ONNX Runtime and generating with it, beside the estimate that `load` and `parity` go by.

    python benchmarks/open_memory.py [--folder DIR] [--json] [--save]

A decoder of random weights (0.5 GB in fp32) is built in each precision, opened in a process of its own and asked for 16 tokens with 3 beams.
Peak and rest are of resident memory over that of the process before anything was opened; mapped files count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

KINDS = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", None),
    "int8": ("bf16", "int8"),
    "int4": ("bf16", "int4"),
    "fp8": ("bf16", "fp8"),
}


def made(kind: str, folder: Path) -> Path:
    """The bundle of a precision."""
    from common import model_config

    from flamingo_export import api
    from flamingo_export.bundle.manifest import ShapeLimits
    from flamingo_export.sources.choice import RandomWeights

    config = model_config("open", layers=6, width=1024, heads=8, every=2, vocab_size=16000)
    storage, policy = KINDS[kind]
    out = folder / f"{kind}.bundle"
    api.build(
        RandomWeights(config=config, seed=0), out=out, storage=storage, policy=policy, uncalibrated=policy is not None,  # type: ignore[arg-type]
        limits=ShapeLimits(max_length=2048), parity="skip", overwrite=True,
    )  # fmt: skip
    return out


def opened(bundle: Path) -> dict[str, int]:
    """Bytes over the process before; called in a process of its own."""
    import numpy as np
    import onnxruntime  # noqa: F401
    import psutil

    import flamingo_export
    from flamingo_export.runtime.model import Model  # noqa: F401

    process = psutil.Process()
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = flamingo_export.load(bundle, threads=1)
    opening, after = peak - before, process.memory_info().rss - before
    model.generate(np.arange(4, 200).tolist(), beams=3, max_new_tokens=16)
    running = process.memory_info().rss - before
    stop.set()
    watcher.join()
    return {"opening_peak": opening, "opened": after, "peak": peak - before, "running": running}


def measured(kind: str, folder: Path) -> dict[str, Any]:
    """One precision: memory, what its weights take opened, and the estimate."""
    from flamingo_export import estimates
    from flamingo_export.bundle.manifest import read_manifest
    from flamingo_export.weights import WeightIndex

    bundle = made(kind, folder)
    done = subprocess.run([sys.executable, __file__, "--open", str(bundle)], stdout=subprocess.PIPE, text=True, check=True)
    index, manifest = WeightIndex.read(bundle), read_manifest(bundle)
    return {
        "stored": sum(index.sizes().values()),
        "weights_opened": estimates.opened_weights(index),
        "estimate": estimates.running(manifest.config, index),
        **json.loads(done.stdout),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to build; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(opened(options.open)))
        return
    with tempfile.TemporaryDirectory(prefix="open-memory-", dir=options.folder) as folder:
        result = {kind: measured(kind, Path(folder)) for kind in KINDS}
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        columns = ("stored", "weights_opened", "opened", "opening_peak", "running", "peak", "estimate")
        print(f"{'MB':6}" + "".join(f"{name:>16}" for name in columns))
        for kind, found in result.items():
            print(f"{kind:6}" + "".join(f"{found[name] / 1e6:16.0f}" for name in columns))
    if options.save:
        import common

        common.save("open_memory", result)


if __name__ == "__main__":
    main()
