"""The `vision_encoder` graph of a torch module that is not one of ours, traced by torch.onnx.

    module -- torch.onnx --> graph, held to the contract --> vision_encoder.onnx
                             its tensors, in fp32        --> weights/vision_encoder.own.safetensors, read as external data like all others

Whether it computes what the module computes is for parity to say, as with every other graph.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.bundle.manifest import FileRecord
from flamingo_export.errors import UnsupportedModel, first_line, pip_install
from flamingo_export.graphs import save_graph
from flamingo_export.specs import SubgraphSpec, subgraph_specs
from flamingo_export.weights import WEIGHTS_FOLDER
from flamingo_reference.checkpoints.files.safetensors_file import open_header
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

# Every operator of it is one that ONNX Runtime and TensorRT take; later ones fuse attention, whose lowering is made for our own graphs.
OPSET = 20
IR_VERSION = 10
WEIGHTS_FILE = f"{WEIGHTS_FOLDER}/vision_encoder.own.safetensors"
_FRAMES = 2
# Shapes and scales stay in the graph: runtimes read them before they read external data.
_INSIDE = 16


def trace_vision_encoder(module: nn.Module, config: ModelConfig) -> ir.Model:
    """A module from pixels [F, 3, I, I] to features [F, P, E] as a graph with the contract's names and shapes, its tensors within.

    The module is left as it is; a copy is traced, in fp32, on the CPU, in evaluation mode. Raises UnsupportedModel if it does not keep to
    the contract, cannot be traced, or needs operators that are not ONNX's own.
    """
    import torch

    if importlib.util.find_spec("onnxscript") is None:
        raise UnsupportedModel(f"tracing a vision encoder needs onnxscript: {pip_install('trace')}")
    spec = subgraph_specs(config)["vision_encoder"]
    still = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    side = config.vision.image_size
    pixels = torch.linspace(-1.0, 1.0, _FRAMES * 3 * side * side).reshape(_FRAMES, 3, side, side)
    _check_contract(still, pixels, spec)
    try:
        program = torch.onnx.export(
            still,
            (pixels,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["pixels"],
            output_names=["features"],
            verbose=False,
        )
    except Exception as error:  # torch raises many kinds
        raise UnsupportedModel(
            f"torch.onnx cannot trace the vision encoder {type(module).__qualname__}: {first_line(error)}. "
            "See torch.onnx.export(module, pixels, dynamo=True) for the whole of it."
        ) from error
    assert program is not None
    return _held_to_contract(program.model, spec, type(module).__qualname__)


def write_traced(module: nn.Module, config: ModelConfig, work: Path, file: str) -> FileRecord:
    """Writes the traced graph as `file` into the bundle folder `work` and its tensors beside all others; the record of the latter."""
    import onnx_ir as ir
    from safetensors.numpy import save_file

    model = trace_vision_encoder(module, config)
    initializers = model.graph.initializers
    tensors = {
        name: np.ascontiguousarray(value.const_value.numpy())
        for name, value in initializers.items()
        if value.const_value is not None and value.const_value.size > _INSIDE and value.const_value.dtype.is_floating_point()
    }
    path = work / WEIGHTS_FILE
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    for name, entry in open_header(path).items():
        initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            entry.start,
            entry.size,
            ir.DataType.from_numpy(tensors[name].dtype),
            shape=ir.Shape(tensors[name].shape),
            name=name,
            base_dir=work,
        )
    save_graph(model, work / file)
    data = path.read_bytes()
    return FileRecord(path=WEIGHTS_FILE, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_contract(module: nn.Module, pixels: Any, spec: SubgraphSpec) -> None:
    """Runs the module once. Raises UnsupportedModel if it gives something else than features of the shape that the config says."""
    import torch

    wanted = (_FRAMES, *spec.output("features").shape[1:])
    try:
        with torch.no_grad():
            found = module(pixels)
    except Exception as error:
        raise UnsupportedModel(
            f"the vision encoder {type(module).__qualname__} does not take pixels {tuple(pixels.shape)}: {error}"
        ) from error
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != wanted or found.dtype != torch.float32:
        shape = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__qualname__
        raise UnsupportedModel(
            f"the vision encoder {type(module).__qualname__} makes {shape} of pixels {tuple(pixels.shape)}, expected torch.float32 {wanted}: "
            "features [F, P, E] by num_patches and feature_width of config.vision. Wrap it in a module that gives them."
        )


def _held_to_contract(model: ir.Model, spec: SubgraphSpec, name: str) -> ir.Model:
    import onnx_ir as ir

    foreign = sorted(
        {f"{node.domain}.{node.op_type}" for node in model.graph.all_nodes() if node.domain}
        | {str(key) for key in model.functions}
    )
    if foreign:
        raise UnsupportedModel(f"the vision encoder {name} needs operators that are not ONNX's own: {', '.join(foreign)}.")
    graph = model.graph
    if [value.name for value in graph.inputs] != ["pixels"] or [value.name for value in graph.outputs] != ["features"]:
        found = f"{[value.name for value in graph.inputs]} -> {[value.name for value in graph.outputs]}"
        raise UnsupportedModel(f"the vision encoder {name} was traced as {found}, expected only pixels -> features.")
    for value, wanted in ((graph.inputs[0], spec.input("pixels")), (graph.outputs[0], spec.output("features"))):
        if value.shape is None or isinstance(value.shape[0], int) or list(value.shape)[1:] != list(wanted.shape)[1:]:
            raise UnsupportedModel(
                f"the vision encoder {name} was traced with {value.name} {value.shape}, expected {list(wanted.shape)}, "
                "F being any number of frames. Look for a shape that its code fixes."
            )
        value.shape = ir.Shape(list(wanted.shape))
    for node in graph.all_nodes():
        node.name = f"vision_encoder/{node.name or node.op_type}"
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="flamingo-export")
