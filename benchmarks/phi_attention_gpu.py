"""Phi cross-attention on a GPU: our kernels against bandwidth, and against other ways to compute the same (phi_rivals.py).

    python benchmarks/phi_attention_gpu.py [--rounds 20] [--library PATH]

32 heads of 128, 64 latents, 32 images. Prefill of 2048 tokens; decoding of 64 sequences of 3 beams, which see their last image. A rival's
first result is compared with ours before it is timed. Each call has inputs of its own, drawn in turn from more than four times the L2; a CUDA
graph of one such round is replayed, and the median of the replays counts. Bytes are the fewest that must move: each input that is used read
once, each result written once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import phi_rivals  # noqa: E402
from gpu.kernel_library import Args, Kernels, arguments  # noqa: E402
from phi_rivals import Call, NotAtHand, Problem  # noqa: E402

HEADS, HEAD_SIZE, LATENTS, IMAGES = 32, 128, 64, 32
TOKENS, SEQUENCES, BEAMS = 2048, 64, 3
NOMINAL = {  # bytes per second, by the vendor's data sheets; the first name found in the device's own
    "H200": 4.8e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "B200": 8.0e12, "A100-SXM4-80GB": 2.04e12, "A100 80GB": 1.94e12,
    "A100": 1.56e12, "L40S": 0.864e12, "L4": 0.3e12, "A10": 0.6e12, "RTX 4090": 1.008e12, "RTX 5090": 1.79e12, "RTX 3090": 0.936e12,
}  # fmt: skip
TARGETS = {
    "prefill bf16, share of the copy bandwidth": 0.7,
    "decode bf16, share of the copy bandwidth": 0.7,
    "decode, SDPA over the gathered image over ours": 1.2,
    "prefill, variable-length attention over ours": 1.0,
    "decode, FlashInfer over ours": 1.0,
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


_ALL_IMAGES = ("FlexAttention", "masked SDPA")
"""Rivals in decoding that want the keys of all images side by side: two sets are 4 GB."""


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
        best = max(best, 2 * size / time_round([partial(target.copy_, source)], rounds))  # type: ignore[list-item]
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


def prefill_problem(kv_dtype: torch.dtype, *, even: bool, tokens: int = TOKENS, images: int = IMAGES) -> Problem:
    """One request of 2048 tokens, its images every 64 tokens, or at drawn places (the first at the start)."""
    starts = torch.arange(0, tokens, tokens // images)
    if not even:
        starts[1:] = torch.randperm(tokens - 1)[: images - 1] + 1
    phi = torch.zeros(tokens, dtype=torch.int64).scatter_(0, starts, 1).cumsum(0)[None].cuda()
    return Problem(queries(1, tokens), bank(images, kv_dtype), bank(images, kv_dtype), torch.randperm(images)[None].cuda(), phi)


def decode_problems(kv_dtype: torch.dtype, count: int) -> list[Problem]:
    """Steps of 64 sequences of 3 beams; the bank has 32 images of each, of which a step reads one. Each call reads another one."""
    k, v = bank(SEQUENCES * IMAGES, kv_dtype), bank(SEQUENCES * IMAGES, kv_dtype)
    rows = (torch.arange(SEQUENCES * IMAGES, device="cuda")).reshape(SEQUENCES, IMAGES)
    return [
        Problem(queries(SEQUENCES, BEAMS), k, v, rows, torch.full((SEQUENCES, BEAMS), image % IMAGES + 1, device="cuda"))
        for image in range(count)
    ]


def prefill_bytes(kv_dtype: torch.dtype) -> int:
    return 2 * TOKENS * HEADS * HEAD_SIZE * 2 + 2 * IMAGES * HEADS * LATENTS * HEAD_SIZE * kv_dtype.itemsize


def decode_bytes(kv_dtype: torch.dtype) -> int:
    return SEQUENCES * (2 * BEAMS * HEADS * HEAD_SIZE * 2 + 2 * HEADS * LATENTS * HEAD_SIZE * kv_dtype.itemsize)


def ours(kernels: Kernels, problems: list[Problem], size: int, rounds: int) -> dict[str, Any]:
    """The kernels on problems whose fewest bytes are `size` each."""
    calls: list[Callable[[], None]] = []
    name = None
    for problem in problems:
        y = torch.empty_like(problem.q)
        args = arguments(problem.q, problem.k, problem.v, problem.media_rows, problem.phi, y)
        name = kernels.name(args)
        calls.append(kernel_call(kernels, args, *vars(problem).values(), y))
    return {"kernel": name, "bytes": size, "sets": len(calls), "seconds": time_round(calls, rounds)}


def rival(kernels: Kernels, make: Callable[[Problem], Call], problems: list[Problem], rounds: int) -> dict[str, Any]:
    """A rival on problems, its first result compared with ours; "not at hand" with the reason where it cannot be had."""
    try:
        calls = [make(problem) for problem in problems]
        y, first = torch.empty_like(problems[0].q), problems[0]
        kernels(arguments(first.q, first.k, first.v, first.media_rows, first.phi, y))
        theirs = calls[0]()
        torch.cuda.synchronize()
        worst = float((theirs.float() - y.float()).abs().max() / y.float().abs().max())
        if not worst < 0.03:  # bf16 has 8 bits; a wrong image is off by far more
            return {"not_at_hand": f"its result differs from ours by {worst:.2g} of the largest number: not the same problem"}
        return {"sets": len(calls), "difference": worst, "seconds": time_round(calls, rounds)}  # type: ignore[arg-type]
    except NotAtHand as error:
        return {"not_at_hand": str(error)}
    except Exception as error:  # another library's, on a card it may not know
        return {"not_at_hand": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure(kernels: Kernels, rounds: int = 20) -> dict[str, Any]:
    """All cases, their ratios, and the targets of those that have one. Needs about 16 GB of free device memory."""
    needed, free = 16 << 30, torch.cuda.mem_get_info()[0]
    if free < needed:
        raise MemoryError(f"the benchmark wants {needed >> 30} GiB of device memory, {free / 2**30:.1f} GiB are free")
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    rows: dict[str, dict[str, Any]] = {}
    copy = copy_bandwidth(rounds)
    for name, dtype, even in (("prefill bf16", bf16, True), ("prefill bf16, ragged", bf16, False), ("prefill fp8", fp8, True)):
        size = prefill_bytes(dtype)
        problems = [prefill_problem(dtype, even=even) for _ in range(sets_for(size))]
        rows[name] = ours(kernels, problems, size, rounds)
        if dtype is bf16:
            for other, make in phi_rivals.PREFILL.items():
                rows[f"{name}, {other}"] = rival(kernels, make, problems, rounds)
        del problems
        torch.cuda.empty_cache()
    for name, dtype in (("decode bf16", bf16), ("decode fp8", fp8)):
        size = decode_bytes(dtype)
        problems = decode_problems(dtype, IMAGES)
        rows[name] = ours(kernels, problems, size, rounds)
        if dtype is bf16:
            for other, make in phi_rivals.DECODE.items():
                few = problems[: 2 if other in _ALL_IMAGES else sets_for(size)]
                rows[f"{name}, {other}"] = rival(kernels, make, few, rounds)
        del problems
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    nominal = next((rate for name, rate in NOMINAL.items() if name in device), None)
    for row in rows.values():
        if "bytes" in row:
            rate = row["bytes"] / row["seconds"]
            row |= {
                "bytes_per_second": rate,
                "share_of_copy": rate / copy,
                "share_of_nominal": rate / nominal if nominal else None,
            }
    seconds = {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    ratios = {
        "prefill bf16, share of the copy bandwidth": rows["prefill bf16"]["share_of_copy"],
        "decode bf16, share of the copy bandwidth": rows["decode bf16"]["share_of_copy"],
        "prefill, bf16 over fp8": seconds["prefill bf16"] / seconds["prefill fp8"],
        "decode, bf16 over fp8": seconds["decode bf16"] / seconds["decode fp8"],
    }
    for what, rivals in (("prefill", phi_rivals.PREFILL), ("decode", phi_rivals.DECODE)):
        for other in rivals:
            if f"{what} bf16, {other}" in seconds:
                ratios[f"{what}, {other} over ours"] = seconds[f"{what} bf16, {other}"] / seconds[f"{what} bf16"]
    reached = {name: ratios[name] >= least for name, least in TARGETS.items() if name in ratios}
    found = {"rows": rows, "ratios": ratios, "targets": TARGETS, "reached": reached}
    return {"copy_bytes_per_second": copy, "nominal_bytes_per_second": nominal, **found}


def main() -> None:
    from gpu.kernel_build import build_library, find_nvcc

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
