"""From a checkpoint's tensors to the bundle's: names, shapes, where each comes from and where it is stored.

    recipes      a tensor of the bundle, and how one is made: transposing, joining, folding
    components   which tensors a model has
    layout       where each lies in its safetensors file

A bundle's matrices are [in, out]; what is constant once training is over is folded: NFNet's standardised kernels and activation gains,
tanh of the gates into the output projections, Transformer-XL's projected distances. `layout` says where each tensor lies in its
safetensors file before a byte of it is written, so graphs can be built, and builds planned, without the weights.
"""

from __future__ import annotations

from flamingo_export.weights.components import bundle_weights
from flamingo_export.weights.layout import (
    INPUT_SCALE,
    SCALE,
    STORAGE_DTYPES,
    WEIGHTS_FOLDER,
    Piece,
    Placed,
    WeightIndex,
    group_file,
    groups,
    layout,
    pieces,
    stored_bytes,
)
from flamingo_export.weights.recipes import (
    DISTANCE_BLOCK,
    GELU_GAIN,
    SQUEEZE_EXCITE_GAIN,
    STANDARDISATION_EPS,
    Weight,
    distance_blocks,
)

__all__ = [
    "DISTANCE_BLOCK",
    "GELU_GAIN",
    "INPUT_SCALE",
    "SCALE",
    "SQUEEZE_EXCITE_GAIN",
    "STANDARDISATION_EPS",
    "STORAGE_DTYPES",
    "WEIGHTS_FOLDER",
    "Piece",
    "Placed",
    "Weight",
    "WeightIndex",
    "bundle_weights",
    "distance_blocks",
    "group_file",
    "groups",
    "layout",
    "pieces",
    "stored_bytes",
]
