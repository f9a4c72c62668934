"""python rtx_parser.py LIBRARY CASE [GRAPH]: what TensorRT for RTX makes of the plugin, as JSON. Needs no GPU.

CASE decoder: parses GRAPH. Another: parses and compiles one call of the function, as CALLS says.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import trt_wheels
from onnx import TensorProto, helper

from flamingo_export.backends.tensorrt import plugin

FP32, FP16, BF16, FP8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN
CALLS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": FP32},
    "fp16": {"dtype": FP16},
    "bf16": {"dtype": BF16, "scale": 0.5},
    "fp8": {"dtype": FP16, "kv": FP8, "kv_scales": 1},
    "fp8 without the attribute": {"dtype": FP16, "kv": FP8},
    "negative scale": {"dtype": FP16, "scale": -0.5},
    "head size 72": {"dtype": FP16, "head_size": 72},
}

trt: Any = trt_wheels.rtx()


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(text)


def call(dtype: int, kv: int | None = None, head_size: int = 64, **attributes: Any) -> bytes:
    """One node as the portable graph writes it, with 3 heads and 11 latents."""
    bank: list[str | int | None] = ["N", 3, 11, head_size]
    inputs = [
        helper.make_tensor_value_info("q", dtype, ["B", "S", 3, head_size]),
        helper.make_tensor_value_info("k", kv or dtype, bank),
        helper.make_tensor_value_info("v", kv or dtype, bank),
        helper.make_tensor_value_info("media_rows", TensorProto.INT64, ["B", "M"]),
        helper.make_tensor_value_info("phi", TensorProto.INT64, ["B", "S"]),
    ]
    if kv is not None:
        inputs += [helper.make_tensor_value_info(name, FP32, []) for name in ("k_scale", "v_scale")]
    y = helper.make_tensor_value_info("y", dtype, ["B", "S", 3, head_size])
    node = helper.make_node(
        "PhiCrossAttention", [one.name for one in inputs], ["y"],
        domain="flamingo", plugin_namespace="flamingo", plugin_version="1", **attributes,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("flamingo", 1)]
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "call", inputs, [y]), opset_imports=opsets, ir_version=10
    )
    return model.SerializeToString()


def compile_call(builder: Any, network: Any, head_size: int) -> int:
    """Bytes of the engine for SM 89, 0 where none was built."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for name, shapes in {
        "q": [(batch, positions, 3, head_size) for batch, positions in ((1, 1), (2, 5), (4, 64))],
        "k": [(rows, 3, 11, head_size) for rows in (1, 7, 32)],
        "v": [(rows, 3, 11, head_size) for rows in (1, 7, 32)],
        "media_rows": [(1, 1), (2, 4), (4, 8)],
        "phi": [(1, 1), (2, 5), (4, 64)],
    }.items():
        profile.set_shape(name, *shapes)  # type: ignore[misc]
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return engine.nbytes if engine else 0


def main(library: str, case: str, graph: str | None = None) -> None:
    log = Log()
    builder = trt.Builder(log)
    plugin.load(trt, Path(library))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(graph) if graph else parser.parse(call(**CALLS[case]))
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    found: dict[str, Any] = {"parsed": parsed, "layers": layers, "errors": log.errors}
    if parsed:
        y = network.get_output(0)
        found["y"] = [y.dtype.name, list(y.shape)]
        if not graph:
            found["bytes"] = compile_call(builder, network, CALLS[case].get("head_size", 64))
    print(json.dumps(found))


main(*sys.argv[1:])
