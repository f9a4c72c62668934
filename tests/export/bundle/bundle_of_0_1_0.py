"""The nano bundle that flamingo-export 0.1.0 built, kept in 2.8 MB: what the checkpoint in the repository gives is left out.

    python tests/export/bundle/bundle_of_0_1_0.py BUNDLE      # packs a bundle anew; `unpack` is what the tests call

Its weights are the checkpoint's, most of them unchanged, transposed or joined: `parts.json` says of each tensor which, in the order of each
file, beside the file's own header. Those that were computed (folded gates, standardised convolutions, projected distances) are in
`rest.safetensors`; every other file is kept as it is. Unpacking gives the same bytes, which the manifest's digests prove.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "reference" / "flamingo_reference" / "nano" / "checkpoint"
PACKED = Path(__file__).parent / "nano-0.1.0"
GOLDEN = "golden/tensors.safetensors"  # the checkpoint has the same file


def unpack(bundle: Path) -> Path:
    """Writes the bundle, byte for byte as 0.1.0 did."""
    shutil.copytree(PACKED / "files", bundle)
    shutil.copyfile(CHECKPOINT / GOLDEN, bundle / GOLDEN)
    given, rest = _given(), load_file(PACKED / "rest.safetensors")
    (bundle / "weights").mkdir()
    for name, file in json.loads((PACKED / "parts.json").read_text(encoding="utf-8")).items():
        with (bundle / "weights" / name).open("wb") as out:
            out.write(base64.b64decode(file["header"]))
            for tensor, parts in file["tensors"].items():
                out.write(_bytes([given[part] for part in parts] or [rest[tensor]]))
    return bundle


def pack(bundle: Path) -> None:
    """Writes PACKED from a bundle."""
    shutil.rmtree(PACKED, ignore_errors=True)
    given = _given()
    known = {_bytes([tensor]): [name] for name, tensor in given.items()}
    for name in given:
        if name.endswith("q_proj.weight.T"):
            query, key, value = (name.replace("q_proj", other) for other in ("q_proj", "k_proj", "v_proj"))
            for joined in ([query, key, value], [key, value]):
                if key in given and len({given[part].shape[0] for part in joined}) == 1:
                    known[_bytes([given[part] for part in joined])] = joined
    rest: dict[str, np.ndarray[Any, Any]] = {}
    files: dict[str, Any] = {}
    for path in sorted((bundle / "weights").iterdir()):
        data, tensors = path.read_bytes(), load_file(path)
        start = 8 + int.from_bytes(data[:8], "little")
        offsets = {name: each["data_offsets"][0] for name, each in json.loads(data[8:start]).items() if name in tensors}
        order = sorted(tensors, key=offsets.__getitem__)
        assert start + sum(tensors[name].nbytes for name in order) == len(data), "gaps between tensors"
        parts = {name: known.get(tensors[name].tobytes(), []) for name in order}
        rest |= {name: tensors[name] for name, found in parts.items() if not found}
        files[path.name] = {"header": base64.b64encode(data[:start]).decode(), "tensors": parts}
    shutil.copytree(bundle, PACKED / "files", ignore=shutil.ignore_patterns("weights", Path(GOLDEN).name))
    assert (bundle / GOLDEN).read_bytes() == (CHECKPOINT / GOLDEN).read_bytes()
    (PACKED / "parts.json").write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    save_file(rest, PACKED / "rest.safetensors")


def _given() -> dict[str, np.ndarray[Any, Any]]:
    """The checkpoint's tensors, matrices also as bundles store them: NAME.T is [in, out]."""
    tensors = load_file(CHECKPOINT / "model.safetensors")
    return tensors | {f"{name}.T": np.ascontiguousarray(tensor.T) for name, tensor in tensors.items() if tensor.ndim == 2}


def _bytes(tensors: list[np.ndarray[Any, Any]]) -> bytes:
    """One tensor, or projections side by side."""
    return (tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=1)).tobytes()


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
