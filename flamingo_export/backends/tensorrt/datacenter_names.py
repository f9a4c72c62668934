"""What this package uses of the datacenter TensorRT bindings beyond names that stand in its source as `trt.Name`.

No GPU-less machine has datacenter TensorRT's libraries, so its API cannot be tried there; that its names exist can. `trt.Name` and
`trt.Enum.MEMBER` are found in the source by the test, members of objects are listed here by their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

MEMBERS: dict[str, tuple[str, ...]] = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "INetworkDefinition": ("num_layers", "get_layer", "num_inputs", "get_input", "num_outputs", "get_output"),
    "ILayer": ("type", "name", "num_outputs", "get_output"),
    "ITensor": ("name", "dtype", "shape"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("code", "desc", "node", "node_name", "node_operator"),
    "IBuilderConfig": (
        "add_optimization_profile",
        "set_memory_pool_limit",
        "set_flag",
        "progress_monitor",
        "profiling_verbosity",
    ),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    "IPluginRegistry": ("load_library", "get_creator"),
    "ILogger": ("log",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "create_engine_inspector",
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
    ),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "execute_async_v3", "set_optimization_profile_async"),
}

# Names of TensorRT for RTX that the datacenter bindings lack, and the reverse is never used: one body serves both.
RTX_ONLY = frozenset({"ComputeCapability"})


def names() -> tuple[str, ...]:
    """MEMBERS as `Class.member`."""
    return tuple(f"{owner}.{member}" for owner, members in MEMBERS.items() for member in members)


def missing(trt: ModuleType, wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of the dotted names that `trt` does not have."""
    return tuple(name for name in wanted if not _has(trt, name))


def _has(owner: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True
