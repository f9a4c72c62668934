"""Seconds and peak memory of building the engines of a bundle's decoder cut into parts, with TensorRT for RTX, one process a part.

    python benchmarks/engine_parts_memory.py BUNDLE --parts 4 [--target sm89] [--first 1] [--save]

BUNDLE: any, such as `flamingo-export build --size 9b --fp8 --parity skip` makes; it is left as it is (its weights are linked into a folder
beside it, which is removed). Needs TensorRT for RTX and no GPU. --first N: only the first N parts.
"""

from __future__ import annotations

import argparse
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

import msgspec
from engine_build_memory import GIB, Anonymous

from flamingo_export.backends.tensorrt.backend import TensorRTBackend
from flamingo_export.backends.tensorrt.estimate import estimate
from flamingo_export.backends.tensorrt.library import RTX
from flamingo_export.bundle.manifest import GraphRecord, read_manifest, write_manifest
from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.weights import WEIGHTS_FOLDER, WeightIndex
from flamingo_export.weights.decoder_cuts import graph_records


def linked(bundle: Path, folder: Path, parts: int) -> list[GraphRecord]:
    """A bundle of the same weights in `folder`, its decoder in parts; returns the parts."""
    (folder / WEIGHTS_FOLDER).mkdir()
    for path in (bundle / WEIGHTS_FOLDER).iterdir():
        os.link(path, folder / WEIGHTS_FOLDER / path.name)
    manifest, index = read_manifest(bundle), WeightIndex.read(folder)
    records = [record for record in graph_records(manifest.config, index.sizes(), parts) if record.layers is not None]
    for record in records:
        layers = range(*record.layers) if record.layers is not None else None
        save_graph(build_graph(manifest.config, record.name, index, layers=layers), folder / record.file)
    write_manifest(folder, msgspec.structs.replace(manifest, graphs=tuple(records), engines=(), files=()))
    return records


def built(folder: Path, name: str, target: str) -> dict[str, Any]:
    """Builds one part's engine in this process."""
    manifest = read_manifest(folder)
    anonymous, started = Anonymous(), time.perf_counter()
    record = TensorRTBackend(RTX, target=target).build(folder, manifest, manifest.graph(name))
    summary = record.summary
    assert summary is not None
    return {
        "part": name,
        "layers": manifest.graph(name).layers,
        "seconds": time.perf_counter() - started,
        "resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anonymous_peak": anonymous.stop(),
        "estimate": estimate(summary.weight_bytes).memory,
        "weight_bytes": summary.weight_bytes,
        "engine_bytes": record.size,
        "fused_attentions": f"{summary.fused_attentions} of {summary.attentions}",
        "quantised_products": f"{summary.quantised_products - summary.widened_products} of {summary.quantised_products}",
        "tool": f"TensorRT for RTX {record.tool_version}",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/engine_parts_TARGET.json")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(built(arguments.bundle, arguments.only, arguments.target)))
        return
    found = []
    place = Path(tempfile.mkdtemp(prefix="engine-", dir=arguments.bundle.resolve().parent))
    try:
        records = linked(arguments.bundle, place, arguments.parts)
        for record in records[: arguments.first or len(records)]:
            command = [sys.executable, __file__, str(place), "--only", record.name, "--target", arguments.target]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            each = json.loads(done.stdout)
            found.append(each)
            print(
                f"{each['part']}, LM layers {each['layers'][0]} to {each['layers'][1] - 1}: {each['weight_bytes'] / GIB:.2f} GiB of weights, "
                f"{each['seconds']:.0f} s, peak {each['anonymous_peak'] / GIB:.2f} GiB anonymous, {each['resident_peak'] / GIB:.2f} GiB with "
                f"mapped files (estimated {each['estimate'] / GIB:.1f}), engine {each['engine_bytes'] / GIB:.2f} GiB; quantised products "
                f"computed as they are {each['quantised_products']}, fused attention {each['fused_attentions']}",
                flush=True,
            )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if arguments.save:
        import common

        result = {"bundle": arguments.bundle.name, "target": arguments.target, "parts": arguments.parts, "built": found}
        print(common.save(f"engine_parts_{arguments.target}", result))


if __name__ == "__main__":
    main()
