"""Whether a single request has become slower: this tree against an earlier one, the same bundles, in turns in one run.

    git worktree add ../before a94ad39
    python benchmarks/lone_request_cpu.py --before ../before [--rounds 9] [--threads 1] [--save]

Each tree runs in a process of its own and answers one request at a time, greedy: a prompt of 512 tokens on the 110M decoder, and a short one on
nano. Printed: a step and a first token, new over old, by the clock and by the processor's time; on a machine that does other work only the
latter says something. The bundles are built by the earlier tree: every later one opens them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import common
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"110M decoder": (512, 24), "nano": (24, 16)}
"""Tokens of the prompt, and new ones."""
_BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
import common
folder = Path(sys.argv[1])
print(common.bundle(common.model_config("decoder-110m", layers=12, width=768, heads=12, every=12), folder))
from flamingo_export.cli import main
sys.argv = ["flamingo-export", "build", "--size", "nano", "--out", str(folder / "nano.bundle"), "--parity", "skip"]
main()
"""
_ANSWER = """
import json, sys, time
import flamingo_export
model = flamingo_export.load(sys.argv[1], threads=int(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    ids, tokens = json.loads(line)
    started, used = time.perf_counter(), time.process_time()
    model.generate(ids, beams=1, max_new_tokens=1)
    first, first_used = time.perf_counter() - started, time.process_time() - used
    ids[1] += 1  # another prompt of the same length
    used = time.process_time()
    result = model.generate(ids, beams=1, max_new_tokens=tokens)
    whole_used = time.process_time() - used
    steps = result.timings.steps
    print(json.dumps({
        "first token": first, "first token, processor": first_used,
        "step": sorted(steps)[len(steps) // 2] if steps else None,
        "step, processor": (whole_used - first_used) / len(steps) if steps else None,
        "tokens": list(result.token_ids),
    }), flush=True)
"""


class Tree:
    """A process that answers with the code of one tree."""

    def __init__(self, tree: Path, bundle: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ANSWER, str(bundle), str(threads)],
            cwd=tree,
            env=_environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a tree's process ended; its message is above")
        return line

    def answer(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """Seconds of one request."""
        sent: IO[str] | None = self._process.stdin
        assert sent is not None
        sent.write(json.dumps([ids, tokens]) + "\n")
        sent.flush()
        found: dict[str, Any] = json.loads(self._read())
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _environment(tree: Path) -> dict[str, str]:
    places = os.pathsep.join(str(tree / part) for part in (".", "reference", "calibration"))
    return {**os.environ, "PYTHONPATH": places}


def compared(trees: dict[str, Tree], prompt: int, tokens: int, rounds: int) -> dict[str, float]:
    """Medians of each tree's seconds, and new over old of each round's."""
    random = np.random.default_rng(0)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for round_ in range(rounds + 1):
        ids = [1, *random.integers(10, 250, prompt - 1).tolist()]
        for name, tree in trees.items() if round_ % 2 else reversed(trees.items()):
            answer = tree.answer(ids, tokens)
            if round_:  # the first warms up
                found[name].append(answer)
    row: dict[str, float] = {}
    for what in ("step", "step, processor", "first token", "first token, processor"):
        pairs = [(new[what], old[what]) for new, old in zip(found["now"], found["before"], strict=True)]
        pairs = [pair for pair in pairs if None not in pair]
        row[f"{what}, now"], row[f"{what}, before"] = np.median(np.array(pairs), axis=0).tolist()
        row[f"{what}, new over old"] = float(np.median([new / old for new, old in pairs]))
    row["equal tokens"] = sum(new["tokens"] == old["tokens"] for new, old in zip(*found.values(), strict=True)) / rounds
    return row


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the earlier tree: git worktree add ../before a94ad39")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where the bundles are kept; default: a temporary folder")
    parser.add_argument("--save", action="store_true", help="write results/lone_request_cpu.json")
    asked = parser.parse_args(arguments)
    before = asked.before.resolve()
    result: dict[str, Any] = {"threads": asked.threads, "rounds": asked.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.work or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        if not (folder / "nano.bundle").exists():
            subprocess.run([sys.executable, "-c", _BUILD, str(folder)], cwd=before, env=_environment(before), check=True)
        for name, bundle in (("110M decoder", "decoder-110m.bundle"), ("nano", "nano.bundle")):
            trees = {"now": Tree(ROOT, folder / bundle, asked.threads), "before": Tree(before, folder / bundle, asked.threads)}
            row = result[name] = compared(trees, *SIZES[name], asked.rounds)
            for tree in trees.values():
                tree.close()
            for what in ("step", "first token"):
                print(
                    f"{name}, {what}: {1e3 * row[f'{what}, now']:.1f} ms, before {1e3 * row[f'{what}, before']:.1f}; new over old "
                    f"{row[f'{what}, new over old']:.3f} by the clock, {row[f'{what}, processor, new over old']:.3f} by the processor's time",
                    flush=True,
                )
            print(f"{name}: equal tokens in {row['equal tokens']:.0%}")
    if asked.save:
        print(common.save("lone_request_cpu", result))


if __name__ == "__main__":
    main(sys.argv[1:])
