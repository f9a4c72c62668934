"""Results of scripts/gpu_check: where they are kept, and the README's table of them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from gpu import build

RESULTS = build.ROOT / "benchmarks" / "results"
RATIOS = (
    "prefill bf16, share of the copy bandwidth",
    "prefill, masked SDPA over ours",
    "decode bf16, share of the copy bandwidth",
    "decode, masked SDPA over ours",
    "prefill, bf16 over fp8",
    "decode, bf16 over fp8",
)


def machine(nvcc: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit, and the digest of the kernels' sources (a copy of the tree may have no commit)."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=build.ROOT, check=False
    )
    found: dict[str, Any] = {
        "device": None,
        "driver": None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda_of_torch": torch.version.cuda,
            "nvcc": build.nvcc_version(nvcc) if nvcc else None,
        },
        "commit": commit.stdout.strip() or None,
        "kernel_sources": build.digest_of_sources(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = "unknown: nvidia-smi does not answer"
    return found


def save(result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes gpu_check-DEVICE.json."""
    device = result["machine"]["device"] or "no device"
    path = folder / f"gpu_check-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def table(folder: Path = RESULTS) -> str:
    """The README's table: a column for each device that was measured, "not measured" where nothing was."""
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
