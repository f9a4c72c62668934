#!/usr/bin/env python3
"""A bundle's decoder on ONNX Runtime beside PyTorch, with the same cache: steps by length and batch, in fp16 or fp32.

    python scripts/gpu/onnxruntime_cuda.py BUNDLE [--provider CUDAExecutionProvider] [--lengths 512 2048] [--batches 1 8] [--steps 30]

Run by scripts/gpu_check in a process of its own, whose path has ONNX Runtime's GPU build before any other. Caches, bank and feeds are tensors of
the device; past and present are one tensor, so that TensorScatter writes in place. Prints one JSON document: differences from PyTorch, nodes
that were left to the CPU, steps per second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DEVICES = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}
HEAVY = frozenset({"Attention", "TensorScatter", "MatMul", "RotaryEmbedding", "RMSNormalization", "LayerNormalization"})
"""Operators that must not run on the CPU: what they read would cross the bus at each step."""


def lowered(bundle: Path, manifest: Any, capacity: int) -> tuple[Any, Any]:
    """The decoder of one capacity in the bundle's type, with the functions' own bodies, and its contract."""
    import onnx_ir as ir

    from flamingo_export.backends.tensorrt.engine_contract import Contract
    from flamingo_export.backends.tensorrt.lowering.lower import lower
    from flamingo_export.specs import subgraph_specs

    graph, compute = manifest.graph("decoder"), manifest.precision.storage
    spec = subgraph_specs(manifest.config, media=manifest.precision.media)["decoder"]
    contract = Contract(spec=spec, profiles=(), capacity=capacity, compute=compute, offered=spec)
    model = lower(ir.load(bundle / graph.file), compute=compute, capacity=capacity, native_functions=frozenset())
    for each in (model.graph, *(function.graph for function in model.functions.values())):
        for node in each:
            node.attributes.pop("TRT_decomposable", None)  # TensorRT's own
    return model, contract


def step_feeds(contract: Any, config: Any, batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    """One token for each request after `length - 1` others, one medium each; caches and bank of drawn numbers."""
    rng = np.random.default_rng(seed)
    dtype = {"fp32": np.float32, "fp16": np.float16}[contract.compute]
    sizes = {"B": batch, "S": 1, "K": 1, "M": 1, "N": min(batch, 8)}
    capacity = contract.capacity
    mask = np.broadcast_to(np.arange(capacity) < length, (batch, 1, 1, capacity)).copy()
    known: dict[str, Array] = {
        "token_ids": rng.integers(1, config.language_model.vocab_size, (batch, 1)),
        "positions": np.full((batch, 1), length - 1),
        "media_rows": np.arange(batch)[:, None] % sizes["N"],
        "phi": np.ones((batch, 1), np.int64),
        "write_index": np.full(batch, length - 1),
        "mask": mask,
        "key_positions": np.broadcast_to(np.arange(capacity), (batch, capacity)).copy(),
        "logit_positions": np.zeros((batch, 1), np.int64),
    }
    found = {}
    for tensor in contract.spec.inputs:
        if tensor.name in known:
            value = known[tensor.name]
            found[tensor.name] = value if tensor.kind == "bool" else value.astype(np.int64)
        else:
            found[tensor.name] = (0.5 * rng.standard_normal(contract.shape(tensor, sizes), np.float32)).astype(dtype)
    return found


def on_onnxruntime(
    path: Path, provider: str, contract: Any, feeds: dict[str, Array]
) -> tuple[Callable[[], None], Callable[[], dict[str, Array]], dict[str, int]]:
    """(a step, what it gave, operators on the CPU): everything bound once in the device's memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[Any] = [provider] if provider == "CPUExecutionProvider" else [provider, "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    if provider not in session.get_providers():
        raise SystemExit(f"{provider} did not load: {session.get_providers()}")
    on_cpu: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == "CPUExecutionProvider":
            on_cpu.update(node.op_type for node in part.get_nodes())
    device, binding = DEVICES[provider], session.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0) for name, value in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    outputs = {}
    for output in session.get_outputs():
        source = contract.spec.aliases.get(output.name)
        if source is None:
            shape = (*feeds["logit_positions"].shape, contract.spec.output(output.name).shape[-1])
            element = np.float32 if contract.compute == "fp32" else np.float16
            outputs[output.name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, device, 0)
            binding.bind_ortvalue_output(output.name, outputs[output.name])
        else:
            binding.bind_ortvalue_output(output.name, held[source])

    def step() -> None:
        session.run_with_iobinding(binding)

    def results() -> dict[str, Array]:
        binding.synchronize_outputs()
        return {name: value.numpy() for name, value in outputs.items()} | {
            source: held[source].numpy() for source in contract.spec.aliases.values()
        }

    return step, results, dict(on_cpu)


def on_torch(
    model: Any, device: str, contract: Any, feeds: dict[str, Array]
) -> tuple[Callable[[], None], Callable[[], dict[str, Array]]]:
    """The same graph in PyTorch; on a GPU its step is a captured graph."""
    import torch

    from gpu.torch_graph import TorchGraph

    graph = TorchGraph(model, torch.device(device))
    held = {name: torch.from_numpy(value.copy()).to(device) for name, value in feeds.items()}
    found: dict[str, Any] = {}

    def step() -> None:
        with torch.no_grad():
            found.update(graph(held))

    run = step
    if device == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        run = captured.replay

    def results() -> dict[str, Array]:
        if device == "cuda":
            torch.cuda.synchronize()
        own = {name: value for name, value in found.items() if name not in contract.spec.aliases}
        return {name: value.cpu().numpy() for name, value in own.items()} | {
            source: held[source].cpu().numpy() for source in contract.spec.aliases.values()
        }

    return run, results


def seconds_of(step: Callable[[], None], results: Callable[[], Any], steps: int) -> float:
    """Of one step: the best of three series, so that what else runs counts least."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    best = float("inf")
    for _ in range(3):
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        best = min(best, (time.perf_counter() - started) / steps)
    results()
    return best


def difference(found: dict[str, Array], right: dict[str, Array]) -> dict[str, float]:
    """Greatest difference over the greatest number: of logits, and of all caches."""
    shares: dict[str, float] = {}
    for name, value in right.items():
        kind = "caches" if name.startswith("past_") else name
        wide = value.astype(np.float64)
        share = float(np.abs(found[name].astype(np.float64) - wide).max() / np.abs(wide).max())
        shares[kind] = max(shares.get(kind, 0.0), share)
    return shares


def measure(bundle: Path, provider: str, lengths: list[int], batches: list[int], steps: int) -> dict[str, Any]:
    """Every length and batch. A length is the cache's capacity too: what attention reads."""
    import onnx_ir as ir
    import onnxruntime

    from flamingo_export.bundle.manifest import read_manifest

    manifest = read_manifest(bundle)
    rows: list[dict[str, Any]] = []
    on_cpu: dict[str, int] = {}
    for length in lengths:
        model, contract = lowered(bundle, manifest, length)
        path = bundle / f".onnxruntime-{os.getpid()}.onnx"
        ir.save(model, path)
        try:
            for batch in batches:
                feeds = step_feeds(contract, manifest.config, batch, length)
                step, results, on_cpu = on_onnxruntime(path, provider, contract, feeds)
                torch_step, torch_results = on_torch(model, DEVICES[provider], contract, feeds)
                for each in (step, torch_step):
                    each()
                row = {"length": length, "batch": batch, "difference": difference(results(), torch_results())}
                row["onnxruntime_steps_per_second"] = 1 / seconds_of(step, results, steps)
                row["torch_steps_per_second"] = 1 / seconds_of(torch_step, torch_results, steps)
                rows.append(row)
        finally:
            path.unlink()
    return {
        "model": manifest.config.name,
        "type": manifest.precision.storage,
        "onnxruntime": onnxruntime.__version__,
        "provider": provider,
        "operators_on_the_cpu": on_cpu if provider != "CPUExecutionProvider" else {},
        "rows": rows,
    }


LARGEST_DIFFERENCE = {"fp32": 2e-4, "fp16": 2e-2}
"""Of PyTorch's and ONNX Runtime's results, over the largest number: either has that type's rounding through the whole decoder."""


def failures(found: dict[str, Any]) -> list[str]:
    """What is wrong: results that differ, heavy operators on the CPU."""
    most = LARGEST_DIFFERENCE[found["type"]]
    faults = [
        f"{found['model']}, length {row['length']}, batch {row['batch']}: {kind} differ by {share:.2g} of the largest, {most:.2g} is allowed"
        for row in found["rows"]
        for kind, share in row["difference"].items()
        if not share <= most
    ]
    heavy = sorted(HEAVY & set(found["operators_on_the_cpu"]))
    if heavy:
        faults.append(
            f"{', '.join(heavy)} run on the CPU: ONNX Runtime {found['onnxruntime']} has no CUDA kernel for them as they are"
        )
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", choices=tuple(DEVICES), default="CUDAExecutionProvider")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch  # noqa: F401  (its CUDA libraries are then there for ONNX Runtime's)

    print(json.dumps(measure(options.bundle, options.provider, options.lengths, options.batches, options.steps)))


if __name__ == "__main__":
    main()
