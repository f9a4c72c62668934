"""The first token of a lone request against transformers' IDEFICS on the CPU, one beam, 1 to 8 images, and where its time goes.

    python benchmarks/first_token_cpu.py [--threads 1] [--runs 5] [--images 1,2,4,8] [--save]

The model is that of `idefics_cpu.py`, the prompt has 512 tokens. Every run has new images and a new prompt, and the two take turns. Printed:
seconds by the clock and of the processor, the ratio of each (on a machine that does other work only the latter says something), our time in
parts, and the share of each kind of node in the decoder's two chunks, by ONNX Runtime's own profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import idefics_cpu
import numpy as np
import torch

import flamingo_export

CHUNK = 256
KINDS = {"MatMul": "dense products", "Attention": "attention"}


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock and of the processor, and the result."""
    started, used = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - started, time.process_time() - used, result


def compared(model: Any, ours: flamingo_export.Model, images: int, runs: int) -> dict[str, float]:
    """Medians."""
    rows: dict[str, list[float]] = {}
    for run in range(runs + 1):
        ids, pictures = idefics_cpu.question(100 * images + run, images)
        clock, processor, answer = timed(lambda: ours.generate(ids, images=pictures, beams=1, max_new_tokens=1))  # noqa: B023
        their_clock, their_processor, found = timed(
            lambda: idefics_cpu.theirs(model, ours.config, ids, pictures, 1, 1)  # noqa: B023
        )
        if run == 0:  # to warm up
            continue
        timings = answer.timings
        row = {
            "ours": clock,
            "transformers": their_clock,
            "ours, processor": processor,
            "transformers, processor": their_processor,
            "times as fast": their_clock / clock,
            "times as fast, processor": their_processor / processor,
            "ours, images and text read": timings.prepare,
            "ours, images encoded": timings.media,
            "ours, prompt computed": timings.prefill,
            "equal tokens": float(list(answer.token_ids) == found[1]),
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in rows.items()}


def shares(bundle: Path, images: int, threads: int, folder: Path) -> dict[str, float]:
    """Share of each kind of node in the decoder's chunks of the prompt, and the largest kinds of products."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.profile_file_prefix, options.log_severity_level = str(folder / "profile"), 3
    session = onnxruntime.InferenceSession(str(bundle / "decoder.onnx"), options)
    capacity = idefics_cpu.PROMPT + 128
    inputs = {each.name: each for each in session.get_inputs()}
    rng, binding = np.random.default_rng(0), session.io_binding()
    caches = {}
    for name, each in inputs.items():
        if name.startswith("past_"):
            shape = (1, each.shape[1], capacity, each.shape[3])
            caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        elif name.startswith(("media_k.", "media_v.")):
            values = rng.normal(size=(images, *each.shape[1:])).astype(np.float32)
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
    for each in session.get_outputs():
        past = each.name.replace("present", "past")
        if past in caches:  # in place
            binding.bind_ortvalue_input(past, caches[past])
            binding.bind_ortvalue_output(each.name, caches[past])
        else:
            binding.bind_output(each.name)
    for _ in range(3):
        for start in range(0, idefics_cpu.PROMPT, CHUNK):
            mask = np.zeros((1, 1, CHUNK, capacity), np.bool_)
            mask[..., :start] = True
            mask[..., start : start + CHUNK] = np.tri(CHUNK, dtype=np.bool_)
            feeds = {
                "token_ids": rng.integers(10, 1000, (1, CHUNK)),
                "positions": np.arange(start, start + CHUNK)[None],
                "media_rows": np.arange(images)[None],
                "phi": (np.arange(CHUNK) * images // CHUNK + 1)[None],
                "write_index": np.array([start]),
                "mask": mask,
                "logit_positions": np.array([[CHUNK - 1]]),
            }
            for name, value in feeds.items():
                binding.bind_cpu_input(name, value)
            session.run_with_iobinding(binding)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [each for each in events if each.get("cat") == "Node" and each["name"].endswith("_kernel_time")]
    spent: Counter[str] = Counter()
    for node in nodes[len(nodes) // 3 :]:  # the first pass warms up
        spent[KINDS.get(node["args"]["op_name"], "the rest")] += node["dur"]
    return {name: value / spent.total() for name, value in spent.most_common()}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--images", default="1,2,4,8")
    parser.add_argument("--work", type=Path, help="where checkpoint and bundle are kept; default: a temporary folder")
    parser.add_argument("--save", action="store_true", help="write results/first_token_cpu.json")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    model = idefics_cpu.idefics()
    result: dict[str, Any] = {"threads": asked.threads, "runs": asked.runs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        bundle = folder / "idefics.bundle"
        if not bundle.exists():
            model.save_pretrained(folder / "idefics")
            flamingo_export.build(folder / "idefics", out=bundle, storage="fp32", parity="skip")
        for images in (1, 8):
            row = result[f"shares, {images} images"] = shares(bundle, images, asked.threads, Path(temporary))
            print(f"{images} image(s), decoder: " + ", ".join(f"{name} {value:.0%}" for name, value in row.items()), flush=True)
        with flamingo_export.load(bundle, threads=asked.threads) as ours:
            for images in map(int, asked.images.split(",")):
                row = result[f"{images} images"] = compared(model, ours, images, asked.runs)
                print(
                    f"{images} image(s): first token {row['ours']:.2f} s, transformers {row['transformers']:.2f}: "
                    f"{row['times as fast']:.2f} times as fast, {row['times as fast, processor']:.2f} by the processor's time; "
                    f"images encoded {row['ours, images encoded']:.2f} s, prompt {row['ours, prompt computed']:.2f} s; equal tokens "
                    f"{row['equal tokens']:.0%}",
                    flush=True,
                )
    if asked.save:
        print(common.save("first_token_cpu", result))


if __name__ == "__main__":
    main(sys.argv[1:])
