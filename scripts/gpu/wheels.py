#!/usr/bin/env python3
"""The package's smaller dependencies as wheels for a machine without network: gathered here, unpacked there.

    python scripts/gpu/wheels.py                     what `make gpu-wheels` does: build/gpu-wheels, for CPython 3.12 on x86-64 Linux
    python scripts/gpu/wheels.py --onnxruntime-gpu   ONNX Runtime with CUDA besides, in pieces that can be taken along one by one

PyTorch, numpy and what PyTorch brings are the machine's own. scripts/gpu_check unpacks the folder by itself, behind what the machine has.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-wheels"
UNPACKED = ROOT / "build" / "gpu_check" / "site"
MOST_BYTES = 60 << 20
"""Of the folder, and of a piece of a larger wheel: what a transfer takes."""
PACKAGES = (
    "annotated-doc", "annotated-types", "click", "jinja2", "markdown-it-py", "markupsafe", "mdurl", "ml-dtypes", "msgspec", "onnx", "onnx-ir",
    "packaging", "pillow", "protobuf", "psutil", "pydantic", "pydantic-core", "pygments", "rich", "safetensors", "shellingham", "tokenizers",
    "typer", "typing-extensions", "typing-inspection",
)  # fmt: skip
"""What the package imports, and what that imports, in the versions of requirements/base.txt; but for numpy and what else PyTorch brings, and for
onnxruntime, which only its own stage wants."""
CUDA = {12: ("cuda-bindings>=12.9,<13", "cuda-pathfinder"), 13: ("cuda-bindings>=13,<14", "cuda-pathfinder")}
"""By the CUDA that the card's driver is for: 13 wants driver 580, 12 any from 525 on."""
LOCK = ROOT / "requirements" / "base.txt"
ONNXRUNTIME = ("onnxruntime-gpu>=1.30", "flatbuffers")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def locked(names: Iterable[str], lock: Path = LOCK) -> list[str]:
    """`name==version` of each, as the lock file has it. Raises KeyError."""
    versions = dict(re.findall(r"^([\w-]+)==(\S+)", lock.read_text(), flags=re.MULTILINE))
    return [f"{name}=={versions[name]}" for name in names]


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
    """Wheels made of the pieces in a folder, and what is missing of others. Any one piece tells how many there are."""
    made, missing = [], []
    for name, total in sorted({tuple(re.split(r"\.piece-\d+-of-", path.name)) for path in folder.glob("*.piece-*-of-*")}):
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


def describe_checkout(target: Path) -> None:
    """Says what the checkout is, as an installation does: builds record the version of what made them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")


def unpacked(folder: Path = FOLDER, target: Path = UNPACKED) -> Path | None:
    """The folder of wheels, unpacked; None where there is none. ONNX Runtime is left to its stage.

    Where others were unpacked before, as those of another CUDA, they go.
    """
    wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not wheel.name.startswith("onnxruntime")]
    if not wheels:
        return None
    if {path.name for path in target.glob(".*.unpacked")} - {f".{wheel.name}.unpacked" for wheel in wheels}:
        shutil.rmtree(target)
    unpack(wheels, target)
    describe_checkout(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument(
        "--cuda", type=int, choices=sorted(CUDA), default=13, help="12 where the card's driver is older than 580"
    )
    parser.add_argument("--onnxruntime-gpu", action="store_true", help="ONNX Runtime with CUDA, in pieces")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in (*options.out.glob("*.whl"), *options.out.glob("*.piece-*")):
        old.unlink()
    download([*locked(PACKAGES), *CUDA[options.cuda]], options.out)
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
            for path in split(wheel) if wheel.stat().st_size > MOST_BYTES else [wheel]:
                print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
