#!/usr/bin/env python3
"""Compiles every kernel for every architecture and writes what ptxas says of each to trt_plugins/kernels/resources.json. Wants nvcc 12.8.

python3 scripts/gpu/resources.py            compile (minutes), write, print the table
python3 scripts/gpu/resources.py --table    print the table of what is written
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import kernel_build

FILE = kernel_build.KERNELS / "resources.json"


def compile_all(nvcc: str, workers: int) -> dict[str, Any]:
    """One compiler call for each source and architecture. What is done is kept under build/, so that the command resumes where it was."""
    digest, version = kernel_build.digest_of_sources(), kernel_build.nvcc_version(nvcc)
    folder = kernel_build.ROOT / "build" / "resources" / f"{digest[:12]}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sorted(kernel_build.KERNELS.glob("*.cu")) for arch in kernel_build.ALL_ARCHITECTURES]

    def one(job: tuple[Path, str]) -> list[dict[str, Any]]:
        source, arch = job
        kept = folder / f"{source.stem}.{arch}.json"
        if not kept.exists():
            found = kernel_build.resources_of(nvcc, source, arch, str(kept.with_suffix(".cubin")))
            kept.write_text(json.dumps([resources.as_json() for resources in found]))
            spilled = sum(resources.spilled for resources in found)
            print(f"{source.name} sm_{arch}: {len(found)} kernels, {spilled} bytes spilled", file=sys.stderr, flush=True)
        kernels: list[dict[str, Any]] = json.loads(kept.read_text())
        return kernels

    with ThreadPoolExecutor(workers) as pool:
        kernels = [resources for found in pool.map(one, jobs) for resources in found]
    return {"nvcc": version, "kernel_sources": digest, "kernels": kernels}


def table(result: dict[str, Any]) -> str:
    """A row for each kernel: registers of a thread on each architecture, shared memory of a block."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for found in result["kernels"]:
        cells.setdefault(found["kernel"], {})[found["architecture"]] = found
    lines = [
        "| kernel, q, k and v, head size | "
        + " | ".join(f"sm_{arch}" for arch in kernel_build.ALL_ARCHITECTURES)
        + " | shared bytes | spilled |",
        "|---" * (len(kernel_build.ALL_ARCHITECTURES) + 3) + "|",
    ]
    for kernel, by_arch in sorted(cells.items(), key=lambda item: (item[0].split()[0], item[0])):
        registers = " | ".join(str(by_arch[arch]["registers"]) for arch in kernel_build.ALL_ARCHITECTURES)
        shared, spilled = (max(found[name] for found in by_arch.values()) for name in ("shared", "spilled"))
        lines.append(f"| {kernel} | {registers} | {shared} | {spilled} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not options.table:
        nvcc = kernel_build.find_nvcc()
        if nvcc is None:
            sys.exit("no nvcc: install the CUDA toolkit, 12.8 or later")
        FILE.write_text(json.dumps(compile_all(nvcc, options.workers), indent=1) + "\n")
    print(table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
