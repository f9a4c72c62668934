#!/usr/bin/env python3
"""The package's smaller dependencies as wheels for a machine without network: gathered here, unpacked there.

    python scripts/gpu/wheels.py                     what `make gpu-wheels` does: build/gpu-wheels, for CPython 3.12 on x86-64 Linux
    python scripts/gpu/wheels.py --onnxruntime-gpu   ONNX Runtime with CUDA besides, in pieces that can be taken along one by one

PyTorch, numpy and what PyTorch brings are the machine's own. scripts/gpu_check unpacks the folder by itself, behind what the machine has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-wheels"
UNPACKED = ROOT / "build" / "gpu_check" / "site"
MOST_BYTES = 60 << 20
"""Of the folder, and of a piece of a larger wheel: what a transfer takes."""
PACKAGES = (
    "click", "cuda-bindings>=13,<14", "cuda-pathfinder", "jinja2", "markdown-it-py", "markupsafe", "mdurl", "ml-dtypes>=0.5",
    "msgspec>=0.20", "onnx>=1.19", "onnx-ir>=0.1.14", "packaging", "pillow>=11", "protobuf", "psutil>=6", "pygments", "rich>=13.9",
    "safetensors>=0.5", "shellingham", "tokenizers>=0.21", "typer>=0.15", "typing-extensions",
)  # fmt: skip
"""What the package imports, and what that imports, but for PyTorch's own needs, numpy, and onnxruntime, which only its own stage wants."""
ONNXRUNTIME = ("onnxruntime-gpu>=1.25", "flatbuffers")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def download(packages: Iterable[str], folder: Path) -> None:
    """Wheels of CPython 3.12 into the folder, without their dependencies. Raises CalledProcessError."""
    target = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    for platform in (*PLATFORMS, "any"):
        target += ["--platform", platform]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        *target,
        "-d",
        str(folder),
    ]
    subprocess.run([*command, *packages], check=True)


def split(path: Path, size: int = MOST_BYTES) -> list[Path]:
    """Cuts a file into pieces NAME.piece-1-of-3 and so on, and deletes it."""
    total = -(-path.stat().st_size // size)
    pieces = [path.with_name(f"{path.name}.piece-{number}-of-{total}") for number in range(1, total + 1)]
    with path.open("rb") as file:
        for piece in pieces:
            piece.write_bytes(file.read(size))
    path.unlink()
    return pieces


def join(folder: Path) -> tuple[list[Path], list[str]]:
    """Wheels made of the pieces in a folder, and what is missing of others."""
    made, missing = [], []
    for first in sorted(folder.glob("*.piece-1-of-*")):
        name, _, total = first.name.partition(".piece-1-of-")
        pieces = [folder / f"{name}.piece-{number}-of-{total}" for number in range(1, int(total) + 1)]
        absent = [piece.name for piece in pieces if not piece.is_file()]
        if absent:
            missing += absent
            continue
        whole = folder / name
        if not whole.is_file():
            partial = whole.with_suffix(".joining")
            with partial.open("wb") as out:
                for piece in pieces:
                    out.write(piece.read_bytes())
            partial.replace(whole)
        made.append(whole)
    return made, missing


def unpack(wheels: Iterable[Path], target: Path) -> Path:
    """What the wheels hold, importable from `target`; a wheel that was unpacked before is left as it is."""
    target.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        done = target / f".{wheel.name}.unpacked"
        if not done.exists():
            with zipfile.ZipFile(wheel) as file:
                file.extractall(target)
            done.touch()
    return target


def unpacked(folder: Path = FOLDER, target: Path = UNPACKED) -> Path | None:
    """The folder of wheels, unpacked; None where there is none. ONNX Runtime is left to its stage."""
    wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not wheel.name.startswith("onnxruntime")]
    return unpack(wheels, target) if wheels else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--onnxruntime-gpu", action="store_true", help="ONNX Runtime with CUDA, in pieces")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in (*options.out.glob("*.whl"), *options.out.glob("*.piece-*")):
        old.unlink()
    download(PACKAGES, options.out)
    size = sum(path.stat().st_size for path in options.out.glob("*.whl"))
    print(f"{options.out}: {len(list(options.out.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        sys.exit(f"the wheels are larger than {MOST_BYTES >> 20} MiB together: leave some out")
    if options.onnxruntime_gpu:
        folder = options.out / "onnxruntime"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        download(ONNXRUNTIME, folder)
        for wheel in list(folder.glob("*.whl")):
            if wheel.stat().st_size > MOST_BYTES:
                for piece in split(wheel):
                    print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
