"""Graphs whose weights ONNX Runtime would not find by itself: those of a bundle made of links, and graphs that lie elsewhere.

ONNX Runtime reads external data only below the folder of the graph, links resolved. In a bundle made of links (Hugging Face's cache, DVC)
the weights resolve to wherever the links lead, and a graph that parity cuts out of a bundle lies in a temporary folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flamingo_export.errors import BundleError
from flamingo_export.weights import WEIGHTS_FOLDER


def loadable(bundle: Path, graph: Path) -> tuple[Path | bytes, Path | None]:
    """What ONNX Runtime is given for a graph on the bundle's weights: its path and None, or its content and the folder that its weights'
    paths begin at (`session.model_external_initializers_file_folder_path`).

    Raises BundleError if such a graph cannot be parsed, or reads anything but files in the bundle's `weights` folder.
    """
    root = bundle.resolve()
    weights = {f"{WEIGHTS_FOLDER}/{path.name}": path.resolve() for path in (bundle / WEIGHTS_FOLDER).glob("*.safetensors")}
    if graph.resolve() == root / graph.name and all(path == root / name for name, path in weights.items()):
        return graph, None
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{graph} cannot be read: {error}. Build the bundle again.") from error
    folder = placed(bundle, graph, model)
    return model.SerializeToString(), folder


def placed(bundle: Path, graph: Path, model: Any) -> Path:
    """Changes an onnx.ModelProto, so that its weights' paths begin at the folder that is returned, links resolved. graph: where it is from.

    Raises BundleError if it reads anything but files in the bundle's `weights` folder.
    """
    weights = {f"{WEIGHTS_FOLDER}/{path.name}": path.resolve() for path in (bundle / WEIGHTS_FOLDER).glob("*.safetensors")}
    folder = Path(os.path.commonpath([path.parent for path in weights.values()] or [bundle.resolve()]))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            if entry.value not in weights:
                raise BundleError(
                    f"{graph} reads {entry.value!r}, which is not among the bundle's weights. Build the bundle again."
                )
            entry.value = os.path.relpath(weights[entry.value], folder)
    return folder
