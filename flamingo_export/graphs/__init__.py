"""Portable ONNX graphs, built from a model's config and an index of its weights. Nothing is traced and no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_export.files import write_atomically
from flamingo_export.specs import IMAGE_TOWER, TEXT_TOWER, towers_of
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    import onnx_ir as ir

    from flamingo_export.weights import WeightIndex


def build_graph(config: ModelConfig, name: str, index: WeightIndex, *, layers: range | None = None) -> ir.Model:
    """The portable graph of a subgraph: opset 24, weights as external tensors below the bundle's root.

    name: one of `specs.subgraph_specs`, or any name for a part of the decoder, whose LM layers `layers` gives. Raises ValueError otherwise.
    """
    from flamingo_export.graphs import decoder, media_kv, resampler, towers, vision_encoder

    if name == "decoder" or layers is not None:
        return decoder.decoder(config, index, layers=layers, name=name)
    builders = {
        "vision_encoder": vision_encoder.vision_encoder,
        "resampler": resampler.resampler,
        "media_kv": media_kv.media_kv,
    }
    tower_builders = {IMAGE_TOWER: towers.image_tower, TEXT_TOWER: towers.text_tower}
    builders |= {tower: tower_builders[tower] for tower in towers_of(config)}
    if name not in builders:
        raise ValueError(f"there is no subgraph {name!r}, expected one of {', '.join((*builders, 'decoder'))}")
    return builders[name](config, index)


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph so that readers see all of it or nothing; its weights stay where they are."""
    import onnx_ir as ir

    write_atomically(path, ir.serde.serialize_model(model).SerializeToString(deterministic=True))
