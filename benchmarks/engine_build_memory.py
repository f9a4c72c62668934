"""Seconds, peak memory and engine size of building a decoder's engine with TensorRT for RTX: whole, in one engine, streamed to disk.

    python benchmarks/engine_build_memory.py [--size 3b] [--layers START:STOP] [--target sm89] [--folder DIR] [--json] [--save]

Needs TensorRT for RTX (pip install tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs), no GPU, and twice the decoder on disk (3b: 10 GB).
Weights are seeded random bits of magnitude 2^-7, different in every layer, as equal ones would be merged. The engine is built in a process of
its own, whose peak is counted two ways: resident memory, in which the pages of mapped weight files count though they can be dropped at any
time, and anonymous memory, which must be there. What is written is removed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from flamingo_export.weights import Weight

GIB = 1 << 30


def write_weights(size: str, layers: range | None, folder: Path) -> int:
    """The decoder's weights in bf16, in the files of a bundle; returns their bytes."""
    from flamingo_export.precision import Precision
    from flamingo_export.weights import bundle_weights, group_file, groups, layout, stored_bytes
    from flamingo_reference.config import SIZES

    config, precision = SIZES[size], Precision(storage="bf16")
    (folder / "weights").mkdir()
    rng, total = np.random.default_rng(0), 0
    for group, weights in groups(bundle_weights(config)).items():
        if not group.startswith("decoder.") or not _wanted(weights[0], layers):
            continue
        with (folder / group_file(group)).open("wb") as file:
            file.write(layout(weights, precision)[0])
            for weight in weights:
                count = stored_bytes(weight, precision)
                total += count
                if weight.full_precision:
                    file.write(rng.standard_normal(count // 4, np.float32).data)
                else:
                    bits = rng.integers(0, 1 << 16, count // 2, np.uint16)
                    bits &= 0x807F  # sign and fraction of bf16
                    bits |= (127 - 7) << 7
                    file.write(bits.data)
    return total


def _wanted(weight: Weight, layers: range | None) -> bool:
    parts = weight.name.split("/")
    return layers is None or (parts[1].startswith("layer.") and int(parts[1].removeprefix("layer.")) in layers)


def built(size: str, layers: range | None, target: str, folder: Path) -> dict[str, object]:
    """Builds the engine in this process."""
    from flamingo_export.backends.tensorrt.backend import TensorRTBackend
    from flamingo_export.backends.tensorrt.library import RTX
    from flamingo_export.bundle.manifest import GraphRecord, Manifest, SourceRecord, default_limits
    from flamingo_export.graphs import build_graph, save_graph
    from flamingo_export.precision import Precision
    from flamingo_export.weights import WeightIndex
    from flamingo_reference.config import SIZES

    config = SIZES[size]
    name = "decoder" if layers is None else f"decoder.{layers.start}"
    save_graph(build_graph(config, name, WeightIndex.read(folder), layers=layers), folder / f"{name}.onnx")
    span = (0, config.language_model.num_layers) if layers is None else (layers.start, layers.stop)
    manifest = Manifest(
        config=config,
        precision=Precision(storage="bf16"),
        limits=default_limits(config),
        source=SourceRecord(kind="random", seed=0),
        graphs=(GraphRecord(name=name, file=f"{name}.onnx", layers=span),),
        files=(),
    )
    anonymous = Anonymous()
    started, used = time.perf_counter(), time.process_time()
    record = TensorRTBackend(RTX, target=target).build(folder, manifest, manifest.graphs[0])
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    assert record.summary is not None
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anonymous_peak": anonymous.stop(),
        "engine_bytes": record.size,
        "weight_bytes": record.summary.weight_bytes,
        "fused_attentions": record.summary.fused_attentions,
        "attentions": record.summary.attentions,
        "activation_bytes": {profile.name: profile.activation_bytes for profile in record.summary.profiles},
        "tool": f"TensorRT for RTX {record.tool_version}",
        "target": target,
    }


class Anonymous:
    """The most anonymous memory of this process, looked at ten times per second (Linux)."""

    def __init__(self) -> None:
        self._peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._peak = max(self._peak, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


def report(result: dict[str, object]) -> str:
    """The result in lines."""
    weights = int(str(result["weight_bytes"]))

    def ratio(key: str) -> str:
        value = int(str(result[key]))
        return f"{value / GIB:.2f} GiB, {value / weights:.2f} times the weights"

    return "\n".join(
        [
            f"{result['what']}: {weights / GIB:.2f} GiB of weights in bf16, {result['tool']} for {result['target']}",
            f"  {result['seconds']:.0f} s, of which the process computed {result['cpu_seconds']:.0f} s",
            f"  peak of anonymous memory {ratio('anonymous_peak')}",
            f"  peak of resident memory, mapped weight files included, {ratio('resident_peak')}",
            f"  engine {ratio('engine_bytes')}",
            f"  fused attention {result['fused_attentions']} of {result['attentions']}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b", choices=("nano", "3b", "9b", "80b"))
    parser.add_argument("--layers", help="START:STOP, a part of the decoder that is neither first nor last; default: all of it")
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write; default: here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = range(*map(int, options.layers.split(":"))) if options.layers else None
    if options.only:
        print(json.dumps(built(options.size, layers, options.target, options.only)))
        return
    place = Path(tempfile.mkdtemp(prefix="engine-", dir=options.folder)).resolve()
    try:
        write_weights(options.size, layers, place)
        command = [sys.executable, __file__, *sys.argv[1:], "--only", str(place)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    what = f"decoder of {options.size}" + (f", layers {options.layers}" if options.layers else "")
    result: dict[str, object] = {"what": what, **json.loads(done.stdout)}
    print(json.dumps(result, indent=1) if options.json else report(result))
    if options.save:
        import common

        common.save(f"engine_{options.size}", result)


if __name__ == "__main__":
    main()
