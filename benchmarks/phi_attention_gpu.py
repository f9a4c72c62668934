"""Phi cross-attention on a GPU: our kernels against torch's scaled_dot_product_attention with the equivalent mask, and against bandwidth.

    python benchmarks/phi_attention_gpu.py [--rounds 20] [--library PATH]

32 heads of 128, 64 latents, 32 images. Prefill of 2048 tokens; decoding of 64 sequences of 3 beams, where torch's attention reads all images
and ours the last. Each call has inputs of its own, drawn in turn from more than four times the L2; a CUDA graph of one such round is replayed,
and the median of the replays counts. Bytes are the fewest that must move: each input that is used read once, each result written once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu.library import Args, Kernels, arguments  # noqa: E402

HEADS, HEAD_SIZE, LATENTS, IMAGES = 32, 128, 64, 32
TOKENS, SEQUENCES, BEAMS = 2048, 64, 3
NOMINAL = {  # bytes a second, by the vendor's data sheets; the first name found in the device's own
    "H200": 4.8e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "B200": 8.0e12, "A100-SXM4-80GB": 2.04e12, "A100 80GB": 1.94e12,
    "A100": 1.56e12, "L40S": 0.864e12, "L4": 0.3e12, "A10": 0.6e12, "RTX 4090": 1.008e12, "RTX 5090": 1.79e12, "RTX 3090": 0.936e12,
}  # fmt: skip
TARGETS = {
    "prefill bf16, share of the copy bandwidth": 0.7,
    "decode bf16, share of the copy bandwidth": 0.7,
    "decode, masked SDPA over ours": 20.0,
    "decode, bf16 over fp8": 1.6,  # of 1.91 by bytes; prefill can have 1.33, since half of its bytes are queries and results
}


def time_round(calls: list[Callable[[], None]], rounds: int) -> float:
    """Median seconds of one call, by replays of a graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for replay in range(rounds + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return float(statistics.median(times))


def sets_for(bytes_of_set: int) -> int:
    """How many sets of inputs are more than four times the L2."""
    return max(2, math.floor(4 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_of_set) + 1)


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a copy on the device: the best of two sizes."""
    best = 0.0
    free = torch.cuda.mem_get_info()[0]
    for size in (256 << 20, 2 << 30):
        if 3 * size > free:
            continue
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        best = max(best, 2 * size / time_round([lambda s=source, t=target: t.copy_(s)], rounds))  # type: ignore[misc]
    return best


def bank(rows: int, dtype: torch.dtype) -> Tensor:
    """Random K or V [rows, H, R, D], filled a row at a time: a float copy of all would not fit everywhere."""
    made = torch.empty(rows, HEADS, LATENTS, HEAD_SIZE, dtype=dtype, device="cuda")
    for row in made:
        row.copy_(torch.randn(HEADS, LATENTS, HEAD_SIZE, device="cuda"))
    return made


def kernel_call(kernels: Kernels, args: Args, *keep: Tensor) -> Callable[[], None]:
    """The call, with the tensors that its arguments point into."""

    def call(keep: tuple[Tensor, ...] = keep) -> None:
        kernels(args)

    return call


def queries(batch: int, positions: int) -> Tensor:
    return torch.randn(batch, positions, HEADS, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)


def prefill(kernels: Kernels, kv_dtype: torch.dtype, rounds: int, *, even: bool) -> dict[str, Any]:
    """One request of 2048 tokens, its images every 64 tokens, or at drawn places (the first at the start)."""
    per_image = HEADS * LATENTS * HEAD_SIZE * kv_dtype.itemsize
    size = 2 * TOKENS * HEADS * HEAD_SIZE * 2 + 2 * IMAGES * per_image
    calls: list[Callable[[], None]] = []
    name = None
    for _ in range(sets_for(size)):
        starts = torch.arange(0, TOKENS, TOKENS // IMAGES)
        if not even:
            starts[1:] = torch.randperm(TOKENS - 1)[: IMAGES - 1] + 1
        phi = torch.zeros(TOKENS, dtype=torch.int64).scatter_(0, starts, 1).cumsum(0)[None].cuda()
        rows = torch.randperm(IMAGES)[None].cuda()
        q, k, v = queries(1, TOKENS), bank(IMAGES, kv_dtype), bank(IMAGES, kv_dtype)
        y = torch.empty_like(q)
        args = arguments(q, k, v, rows, phi, y)
        name = kernels.name(args)
        calls.append(kernel_call(kernels, args, q, k, v, rows, phi, y))
    return {"kernel": name, "bytes": size, "sets": len(calls), "seconds": time_round(calls, rounds)}


def prefill_sdpa(rounds: int) -> dict[str, Any]:
    """All images as keys [1,H,32*64,D], the equivalent mask as additive bf16."""
    size = 2 * TOKENS * HEADS * HEAD_SIZE * 2 + 2 * IMAGES * HEADS * LATENTS * HEAD_SIZE * 2
    image_of_token = torch.arange(TOKENS, device="cuda") // (TOKENS // IMAGES)
    image_of_key = torch.arange(IMAGES * LATENTS, device="cuda") // LATENTS
    mask = torch.zeros(TOKENS, IMAGES * LATENTS, device="cuda", dtype=torch.bfloat16)
    mask.masked_fill_(image_of_token[:, None] != image_of_key, -torch.inf)
    calls: list[Callable[[], None]] = []
    for _ in range(sets_for(size)):
        q = torch.randn(1, HEADS, TOKENS, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, HEADS, IMAGES * LATENTS, HEAD_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        calls.append(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))  # type: ignore[misc, arg-type]
    return {"sets": len(calls), "seconds": time_round(calls, rounds)}


def decode(kernels: Kernels, kv_dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """A step of 64 sequences of 3 beams; the bank has 32 images of each, of which a step reads one. Each call reads another one."""
    size = SEQUENCES * (2 * BEAMS * HEADS * HEAD_SIZE * 2 + 2 * HEADS * LATENTS * HEAD_SIZE * kv_dtype.itemsize)
    k, v = bank(SEQUENCES * IMAGES, kv_dtype), bank(SEQUENCES * IMAGES, kv_dtype)
    phi = torch.ones(SEQUENCES, BEAMS, dtype=torch.int64, device="cuda")
    calls: list[Callable[[], None]] = []
    name = None
    for image in range(IMAGES):
        rows = (torch.arange(SEQUENCES, device="cuda") * IMAGES + image)[:, None].contiguous()
        q = queries(SEQUENCES, BEAMS)
        y = torch.empty_like(q)
        args = arguments(q, k, v, rows, phi, y)
        name = kernels.name(args)
        calls.append(kernel_call(kernels, args, q, k, v, rows, phi, y))
    return {"kernel": name, "bytes": size, "sets": len(calls), "seconds": time_round(calls, rounds)}


def decode_sdpa(rounds: int, *, images: int) -> dict[str, Any]:
    """Keys of all images [64,H,images*64,D] and a mask that leaves the last one; with one image, no mask."""
    keys = images * LATENTS
    mask = None
    if images > 1:
        mask = torch.full((1, 1, BEAMS, keys), -torch.inf, device="cuda", dtype=torch.bfloat16)
        mask[..., -LATENTS:] = 0
        mask = mask.expand(SEQUENCES, HEADS, BEAMS, keys)
    size = SEQUENCES * HEADS * HEAD_SIZE * 2 * (2 * BEAMS + 2 * keys)
    calls: list[Callable[[], None]] = []
    for _ in range(sets_for(size)):
        q = torch.randn(SEQUENCES, HEADS, BEAMS, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(SEQUENCES, HEADS, keys, HEAD_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        calls.append(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))  # type: ignore[misc, arg-type]
    return {"sets": len(calls), "seconds": time_round(calls, rounds)}


def measure(kernels: Kernels, rounds: int = 20) -> dict[str, Any]:
    """All cases, their ratios, and the targets of those that have one. Needs about 10 GB of free device memory."""
    needed, free = 10 << 30, torch.cuda.mem_get_info()[0]
    if free < needed:
        raise MemoryError(f"the benchmark wants {needed >> 30} GiB of device memory, {free / 2**30:.1f} GiB are free")
    fp8 = torch.float8_e4m3fn
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "prefill bf16": lambda: prefill(kernels, torch.bfloat16, rounds, even=True),
        "prefill bf16, ragged": lambda: prefill(kernels, torch.bfloat16, rounds, even=False),
        "prefill fp8": lambda: prefill(kernels, fp8, rounds, even=True),
        "prefill bf16, masked SDPA": lambda: prefill_sdpa(rounds),
        "decode bf16": lambda: decode(kernels, torch.bfloat16, rounds),
        "decode fp8": lambda: decode(kernels, fp8, rounds),
        "decode bf16, masked SDPA": lambda: decode_sdpa(rounds, images=IMAGES),
        "decode bf16, SDPA over the last image": lambda: decode_sdpa(rounds, images=1),
    }
    copy = copy_bandwidth(rounds)
    device = torch.cuda.get_device_name()
    nominal = next((rate for name, rate in NOMINAL.items() if name in device), None)
    rows: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        rows[name] = step()
        torch.cuda.empty_cache()
    for row in rows.values():
        if "bytes" in row:
            rate = row["bytes"] / row["seconds"]
            row |= {
                "bytes_per_second": rate,
                "share_of_copy": rate / copy,
                "share_of_nominal": rate / nominal if nominal else None,
            }
    seconds = {name: row["seconds"] for name, row in rows.items()}
    ratios = {
        "prefill bf16, share of the copy bandwidth": rows["prefill bf16"]["share_of_copy"],
        "decode bf16, share of the copy bandwidth": rows["decode bf16"]["share_of_copy"],
        "prefill, masked SDPA over ours": seconds["prefill bf16, masked SDPA"] / seconds["prefill bf16"],
        "decode, masked SDPA over ours": seconds["decode bf16, masked SDPA"] / seconds["decode bf16"],
        "prefill, bf16 over fp8": seconds["prefill bf16"] / seconds["prefill fp8"],
        "decode, bf16 over fp8": seconds["decode bf16"] / seconds["decode fp8"],
    }
    reached = {name: ratios[name] >= least for name, least in TARGETS.items()}
    found = {"rows": rows, "ratios": ratios, "targets": TARGETS, "reached": reached}
    return {"copy_bytes_per_second": copy, "nominal_bytes_per_second": nominal, **found}


def main() -> None:
    from gpu.build import build_library, find_nvcc

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--library", type=Path, help="libflamingo_kernels.so; built with nvcc for this GPU where not given")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device, or no driver: nothing to measure")
    library = options.library
    if library is None:
        nvcc = find_nvcc()
        if nvcc is None:
            sys.exit("no nvcc: install the CUDA toolkit or give --library")
        major, minor = torch.cuda.get_device_capability()
        library, _ = build_library(nvcc, f"{major}{minor}", ROOT / "build" / "gpu_check")
    print(json.dumps(measure(Kernels(library), options.rounds), indent=1))


if __name__ == "__main__":
    main()
