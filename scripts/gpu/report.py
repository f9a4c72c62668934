"""Results of scripts/gpu_check: where they are kept, and the README's table of them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from gpu import kernel_build

RESULTS = kernel_build.ROOT / "benchmarks" / "results"
RATIOS = (
    "prefill bf16, share of the copy bandwidth",
    "prefill, SDPA image by image over ours",
    "prefill, variable-length attention over ours",
    "prefill, FlexAttention over ours",
    "prefill, masked SDPA over ours",
    "decode bf16, share of the copy bandwidth",
    "decode, SDPA over the gathered image over ours",
    "decode, FlexAttention over ours",
    "decode, FlashInfer over ours",
    "decode, masked SDPA over ours",
    "prefill, bf16 over fp8",
    "decode, bf16 over fp8",
)
"""Rows of the table. Masked attention over all images stands beside the fair rivals, and does not take their place."""


def machine(nvcc: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit, and the digest of the kernels' sources (a copy of the tree may have no commit)."""
    import torch

    found: dict[str, Any] = {
        "device": None,
        "driver": None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda_of_torch": torch.version.cuda,
            "nvcc": kernel_build.nvcc_version(nvcc) if nvcc else None,
        },
        "commit": _commit(),
        "kernel_sources": kernel_build.digest_of_sources(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = "unknown: nvidia-smi does not answer"
    return found


def _commit() -> str | None:
    """Of the checkout; None where it is none, or there is no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=kernel_build.ROOT, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _path(machine: dict[str, Any], folder: Path) -> Path:
    return folder / f"gpu_check-{re.sub(r'[^a-z0-9]+', '-', (machine['device'] or 'no device').lower()).strip('-')}.json"


def _earlier(machine: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Stages of earlier runs on this card; none where the kernels were others, or the file was cut off."""
    try:
        found = json.loads(_path(machine, folder).read_text())
    except (OSError, ValueError):
        return {}
    if found.get("machine", {}).get("kernel_sources") != machine.get("kernel_sources"):
        return {}
    stages: dict[str, Any] = found.get("stages", {})
    return stages


def measured(machine: dict[str, Any], folder: Path = RESULTS) -> dict[str, float]:
    """Seconds that stages took when they last passed on this card."""
    stages = _earlier(machine, folder)
    return {name: stage["seconds"] for name, stage in stages.items() if stage["status"] == "passed" and "seconds" in stage}


_SAYS_NOTHING = ("no time", "not installed")


def save(result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes gpu_check-DEVICE.json: these stages, and those of earlier runs of the same kernels on the same card. Readers see all or nothing.

    A stage that was not run this time does not take the place of one that was.
    """
    stages = _earlier(result["machine"], folder)
    for name, stage in result["stages"].items():
        if name not in stages or stage.get("status") not in _SAYS_NOTHING:
            stages[name] = stage
    path = _path(result["machine"], folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"machine": result["machine"], "stages": stages}, indent=1) + "\n")
    temporary.replace(path)
    return path


def table(folder: Path = RESULTS) -> str:
    """The table of docs/gpu.md: a column for each device that was measured, "not measured" where nothing was."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu_check-*.json"))]
    measured = [result for result in found if result["machine"]["device"]]
    titles = [f"{result['machine']['device']} ({result['machine']['commit'] or 'no commit'})" for result in measured] or [
        "any GPU"
    ]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for ratio in RATIOS:
        cells = []
        for result in measured or [{}]:
            value = result.get("stages", {}).get("benchmark", {}).get("result", {}).get("ratios", {}).get(ratio)
            cells.append("not measured" if value is None else f"{value:.0%}" if "share" in ratio else f"{value:.2f} x")
        lines.append(f"| {ratio} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
