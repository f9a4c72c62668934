"""Memory and time of a build: peak resident memory, and time over merely drawing, casting, hashing and writing the same weights.

    python benchmarks/build_memory.py --size 3b [--folder DIR] [--json] [--no-baseline] [--save]

The baseline does for each tensor of the bundle, one after the other in one thread: draw as many numbers with the same generator, cast
them to the storage type, hash and write them (each file brought to the disk, as the build does). Both run in processes of their own, one
after the other; what they write is removed. Needs the bundle's size on disk once (3b: 6 GB, 9b: 23 GB).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_export.pipeline.build_request import BuildRequest, resolve_precision
from flamingo_export.sources.choice import RandomWeights, source_for_size

GIB = 1 << 30
CHUNK = 1 << 20


def built(size: str, folder: Path) -> dict[str, Any]:
    """Builds; called in a process of its own."""
    from flamingo_export.pipeline import run as pipeline

    started = time.perf_counter()
    request = BuildRequest(source=source_for_size(size, seed=0), out=folder / "b.bundle", parity="skip")
    result = pipeline.build(request)
    seconds = time.perf_counter() - started
    graphs = [(folder / "b.bundle" / graph.file).stat().st_size for graph in result.manifest.graphs]
    return {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "stored_bytes": sum(file.size for file in result.manifest.files),
        "largest_graph_bytes": max(graphs),
    }


def baseline(size: str, folder: Path) -> dict[str, Any]:
    """Draws, casts, hashes and writes the same weights, nothing else; called in a process of its own."""
    from flamingo_export.pipeline.write_weights import cast
    from flamingo_export.sources.random_weights import draw
    from flamingo_export.weights import STORAGE_DTYPES, bundle_weights, groups

    source = source_for_size(size, seed=0)
    assert isinstance(source, RandomWeights)
    precision = resolve_precision(source.config, None)
    spent = dict.fromkeys(("draw", "cast", "hash", "write"), 0.0)
    started = time.perf_counter()
    for group, members in groups(bundle_weights(source.config)).items():
        path = folder / f"{group}.safetensors"
        with path.open("wb", buffering=0) as file:
            digest = hashlib.sha256()
            for index, weight in enumerate(members):
                marks = [time.perf_counter()]
                values = draw([0, index], int(np.prod(weight.shape)), 1.0)
                marks.append(time.perf_counter())
                values = cast(values, np.dtype(STORAGE_DTYPES[weight.storage(precision)]))
                marks.append(time.perf_counter())
                data = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
                digest.update(data)
                marks.append(time.perf_counter())
                for start in range(0, len(data), CHUNK):
                    file.write(data[start : start + CHUNK])
                marks.append(time.perf_counter())
                for part, begun, ended in zip(spent, marks, marks[1:], strict=False):
                    spent[part] += ended - begun
            begun = time.perf_counter()
            os.fsync(file.fileno())
            spent["write"] += time.perf_counter() - begun
    return {"seconds": time.perf_counter() - started, "parts": {part: round(value, 2) for part, value in spent.items()}}


def apart(kind: str, size: str, folder: Path) -> dict[str, Any]:
    """One of the two in a process of its own, on an empty folder that is removed afterwards."""
    place = Path(tempfile.mkdtemp(prefix=f"build-{kind}-", dir=folder))
    try:
        command = [sys.executable, __file__, "--size", size, "--only", kind, "--folder", str(place)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b", choices=("nano", "3b", "9b", "80b"))
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write; default: here")
    parser.add_argument("--no-baseline", action="store_true", help="only the build")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--only", choices=("built", "baseline"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"built": built, "baseline": baseline}[options.only](options.size, options.folder)))
        return
    build = apart("built", options.size, options.folder)
    result: dict[str, Any] = {"size": options.size, "build": build, "cores": os.cpu_count()}
    if not options.no_baseline:
        bare = apart("baseline", options.size, options.folder)
        result |= {"baseline": bare, "time_ratio": float(str(build["seconds"])) / float(str(bare["seconds"]))}
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(report(result))
    if options.save:
        import common

        common.save(f"build_{options.size}", result)


def report(result: dict[str, Any]) -> str:
    """The result in lines."""
    build = result["build"]
    assert isinstance(build, dict)
    lines = [
        f"build --size {result['size']}: {build['seconds']:.1f} s, {build['stored_bytes'] / 1e9:.2f} GB stored",
        f"  peak resident memory {build['peak_bytes'] / GIB:.2f} GiB (aim: 4 at most)",
        f"  largest graph file {build['largest_graph_bytes'] / 1e6:.2f} MB (aim: below 5)",
    ]
    if isinstance(bare := result.get("baseline"), dict):
        parts = ", ".join(f"{part} {seconds}" for part, seconds in bare["parts"].items())
        lines += [
            f"merely drawing, casting, hashing and writing the same weights: {bare['seconds']:.1f} s ({parts})",
            f"  time of the build over it: {result['time_ratio']:.2f} (aim: 1.5 at most)",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
