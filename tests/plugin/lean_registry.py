"""python lean_registry.py LIBRARY: what lean TensorRT's registry makes of the plugin library, as JSON. Needs no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import trt_wheels

from flamingo_export.backends.tensorrt import plugin
from flamingo_export.errors import BackendError, IncompatibleEngine

trt = trt_wheels.lean()
path = Path(sys.argv[1])
found: dict[str, Any] = {"before": trt.get_plugin_registry().get_creator("PhiCrossAttention", "1", "flamingo") is not None}
found["digests"] = [plugin.load(trt, path), plugin.load(trt, path, expected=plugin.digest(path))]

registry = trt.get_plugin_registry()  # never a Runtime: it crashes without a driver
found["creators"] = [
    [one.name, one.plugin_version, one.plugin_namespace] for one in registry.all_creators if one.name == "PhiCrossAttention"
]
creator = registry.get_creator("PhiCrossAttention", "1", "flamingo")
found["fields"] = [[field.name, field.type.name] for field in creator.field_names]


def creates(phase: Any, **fields: np.ndarray) -> bool:
    types = {"float32": trt.PluginFieldType.FLOAT32, "int32": trt.PluginFieldType.INT32}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(name, value, types[value.dtype.name]) for name, value in fields.items()]
    )
    return creator.create_plugin("decoder/layer.1/cross_attention/phi_attention", collection, phase) is not None


scale, one, negative = np.array([0.5], np.float32), np.array([1], np.int32), np.array([-0.5], np.float32)
BUILD, RUNTIME = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
found["created"] = {
    "no attributes": creates(BUILD),
    "scale": creates(BUILD, scale=scale),
    "fp8": creates(BUILD, scale=scale, kv_scales=one),
    "from an engine": creates(RUNTIME, kv_scales=one),
    "negative scale": creates(BUILD, scale=negative),
    "unknown": creates(BUILD, alpha=scale),
}

other = path.with_name("other.so")
other.write_bytes(path.read_bytes() + b"\0")
errors: dict[str, list[str]] = {}
for case, arguments in {
    "another library": {"path": other},
    "another digest": {"path": path, "expected": "0" * 64},
    "no file": {"path": path.with_name("absent.so")},
}.items():
    try:
        plugin.load(trt, **arguments)  # type: ignore[arg-type]
    except (BackendError, IncompatibleEngine) as error:
        errors[case] = [type(error).__name__, str(error)]
found["errors"] = errors
print(json.dumps(found))
