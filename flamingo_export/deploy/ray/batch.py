"""Answers a file of requests with several workers on Ray Data.

    python -m flamingo_export.deploy.ray.batch BUNDLE --requests in.parquet --out results/ --workers 2

Each worker opens the bundle once and answers blocks of requests through one engine, as `generate --requests` does on one machine. A block's
results are a file that is there once it is complete, so a run that was stopped, by kill -9 even, does what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from flamingo_export.bundle.identity import bundle_digest
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.deploy.ray.blocks import Block, as_json_lines, claim, cut, finished, identity_of
from flamingo_export.deploy.ray.failures import reason_of
from flamingo_export.deploy.ray.start import connect
from flamingo_export.errors import BackendError, FlamingoExportError, InputError
from flamingo_export.files import exclusive, write_atomically

_FIELDS = tuple(field.name for field in fields(Block))


class Worker:
    """Answers blocks, in a process of Ray's."""

    def __init__(self, bundle: str, requests: str, folder: str, out: str, options: dict[str, Any]) -> None:
        """requests: JSON lines. folder: what their paths are relative to. options: of `flamingo_export.load`."""
        import flamingo_export

        self._model = flamingo_export.load(Path(bundle), **options)
        self._requests, self._folder, self._out = Path(requests), Path(folder), Path(out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Blocks of the batch, each written when it is complete; returns how many lines were done and failed."""
        from flamingo_export.serve.file_answers import answer_lines, failed

        done = []
        for values in zip(*(batch[name] for name in _FIELDS), strict=True):
            block = Block(**{name: int(value) for name, value in zip(_FIELDS, values, strict=True)})
            results = answer_lines(self._model, self._folder, block.read(self._requests), first=block.first + 1)
            text = b"".join(json.dumps(result, ensure_ascii=False).encode() + b"\n" for result in results)
            write_atomically(block.path(self._out), text)
            done.append((len(results), sum(map(failed, results))))
        return {"done": [each[0] for each in done], "failed": [each[1] for each in done]}


def run(bundle: Path, requests: Path, out: Path, *, workers: int, size: int, options: dict[str, Any]) -> tuple[int, int]:
    """Answers what is missing; returns (requests, how many of them failed), those of earlier runs too. Raises InputError."""
    import ray

    identity = identity_of(requests, bundle_digest(read_manifest(bundle)), size)
    with exclusive(
        out.with_name(out.name + ".lock"),
        busy=lambda holder: InputError(
            f"another command (process {holder}) writes to {out}. Wait for it, or name another --out."
        ),
        unwritable=lambda error: InputError(f"{out} cannot be written: {error.strerror}"),
    ):
        claim(out, identity)
        lines = as_json_lines(requests, out)
        blocks = cut(lines, size)
        missing = [block for block in blocks if not block.path(out).exists()]
        if missing:
            ray.data.DataContext.get_current().enable_progress_bars = False
            ray.data.from_items([asdict(block) for block in missing], override_num_blocks=len(missing)).map_batches(
                Worker,
                fn_constructor_args=tuple(
                    map(str, (bundle.resolve(), lines.resolve(), requests.resolve().parent, out.resolve()))
                ),
                fn_constructor_kwargs={"options": options},
                batch_size=1,
                concurrency=workers,
                num_cpus=1,
                num_gpus=0 if options["device"] == "cpu" else options["device"].count(",") + 1,
            ).materialize()
        total = failures = 0
        for block in blocks:
            for line in block.path(out).read_bytes().splitlines():
                total += 1
                failures += json.loads(line).get("error") is not None
        finished(out)
    return total, failures


def check_resources(owner: bool, workers: int, gpus: int) -> None:
    """Says where workers would wait for CPUs or GPUs that are not there. owner: nobody will add any. Raises BackendError then."""
    import ray

    for name, wanted in (("CPU", workers), ("GPU", gpus)):
        found = int(ray.cluster_resources().get(name, 0))
        if found < wanted:
            text = f"{wanted} workers want {wanted} {name}s, there are {found}"
            if owner and not found:
                raise BackendError(f"{text}. Use --device cpu, or a cluster that has some (RAY_ADDRESS).")
            print(f"batch: {text}: some wait for others", file=sys.stderr)


def answered(asked: argparse.Namespace, options: dict[str, Any]) -> tuple[int, int]:
    """As `run`. Raises BackendError with the reason of a worker that failed."""
    from ray.exceptions import RayError

    try:
        return run(asked.bundle, asked.requests, asked.out, workers=asked.workers, size=asked.block, options=options)
    except RayError as error:
        raise BackendError(f"a worker failed: {reason_of(str(error))}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; exit code 1 if a line failed, as `generate --requests` has it."""
    parser = argparse.ArgumentParser(prog="batch", description="Answers a file of requests with several workers on Ray Data.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--requests", type=Path, required=True, help="JSON lines, or a parquet file with the same fields as columns"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=64, help="requests of a block")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args(arguments)
    if asked.workers < 1 or asked.block < 1:
        parser.error("--workers and --block are at least 1")
    options = {"backend": asked.backend, "device": asked.device, "threads": asked.threads}
    try:
        open_bundle(asked.bundle)
        check_resources(connect(), asked.workers, 0 if asked.device == "cpu" else asked.workers)
        total, failures = answered(asked, options)
    except FlamingoExportError as error:
        print(f"batch: {error}", file=sys.stderr)
        return 1
    print(f"{total} requests, {failures} failed: {asked.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
