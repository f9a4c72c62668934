"""One LM layer, with the gated block before it, cut out of a bundle's own decoder graph: what runs is what the bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import ParityError
from flamingo_export.specs import decoder_spec

if TYPE_CHECKING:
    import onnx_ir as ir


def layer_graph(bundle: Path, manifest: Manifest, layer: int, *, name: str) -> ir.Model:
    """The part of the decoder with LM layer `layer`; inputs and outputs are those of `specs.decoder_spec`, weights stay where they are,
    its table of distances may be given cut as in the whole.

    Raises ParityError if the graph does not have the layer as one piece between two hidden states.
    """
    import onnx_ir as ir

    record, layers = next(pair for pair in manifest.decoder_graphs() if layer in pair[1])
    whole = ir.load(bundle / record.file)
    spec = decoder_spec(manifest.config, range(layer, layer + 1), name=name, media=manifest.precision.media)
    boundaries = {}
    if layer > layers.start:
        boundaries["hidden"] = _after(whole, layer - 1)
    if layer + 1 < layers.stop:
        boundaries["hidden_out"] = _after(whole, layer)
    try:
        part = ir.convenience.extract(
            whole.graph,
            [boundaries.get(tensor.name, tensor.name) for tensor in spec.inputs],
            [boundaries.get(tensor.name, tensor.name) for tensor in spec.outputs],
        )
    except ValueError as error:
        raise ParityError(f"{record.file} cannot be cut around LM layer {layer}: {error}. Build the bundle again.") from error
    for tensor, value in [*zip(spec.inputs, part.inputs, strict=True), *zip(spec.outputs, part.outputs, strict=True)]:
        value.name = tensor.name
        value.shape = ir.Shape(list(tensor.shape))
        if tensor.kind == "float":
            value.type = ir.TensorType(ir.DataType.FLOAT)
    tables = {value.name for value in whole.graph.inputs if value.is_initializer()}
    part.inputs.extend(value for name, value in part.initializers.items() if name in tables)
    functions = [function for function in whole.functions.values() if layer in manifest.config.gated_layers]
    return ir.Model(part, ir_version=whole.ir_version, producer_name="flamingo-export", functions=functions)


def _after(model: ir.Model, layer: int) -> str:
    """Name of the hidden states that leave an LM layer."""
    wanted = f"decoder/layer.{layer}/ffw_residual"
    for node in model.graph:
        if node.name == wanted and node.outputs[0].name:
            return node.outputs[0].name
    raise ParityError(f"the decoder's graph has no node {wanted}, where LM layer {layer} ends. Build the bundle again.")
