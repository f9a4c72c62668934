"""What this package uses of the datacenter TensorRT bindings beyond names that stand in its source as `trt.Name`.

No GPU-less machine has datacenter TensorRT's libraries, so its API cannot be tried there; that its names exist can. `trt.Name` and
`trt.Enum.MEMBER` are found in the source by the test, members of objects are listed here by their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

MEMBERS: dict[str, tuple[str, ...]] = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network_to_stream"),
    "IBuilderConfig": (
        "add_optimization_profile", "clear_flag", "create_timing_cache", "get_timing_cache", "set_flag", "set_timing_cache",
        "profiling_verbosity", "progress_monitor",
    ),
    "IConstantLayer": ("weights",),
    "IConvolutionLayer": ("bias", "kernel"),
    "ICudaEngine": (
        "create_engine_inspector", "create_execution_context", "device_memory_size_v2", "get_aliased_input_tensor",
        "get_tensor_dtype", "get_tensor_mode", "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
        "num_optimization_profiles",
    ),
    "EngineInspector": ("get_engine_information",),
    "IExecutionContext": (
        "execute_async_v3", "infer_shapes", "set_device_memory", "set_input_shape", "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "IHostMemory": ("nbytes",),
    "ILayer": ("get_input", "get_output", "name", "num_inputs", "num_outputs", "type"),
    "ILogger": ("log",),
    "IAttention": ("get_input",),
    "IAttentionOutputLayer": ("attention",),
    "INetworkDefinition": (
        "add_cast", "add_elementwise", "add_shape", "add_slice", "get_input", "get_layer", "get_output", "num_inputs", "num_layers",
        "num_outputs",
    ),
    "LayerType": ("CAST", "ELEMENTWISE", "IDENTITY", "SHUFFLE"),
    "IOptimizationProfile": ("set_shape",),
    "IPluginCreatorV3One": ("name", "plugin_namespace", "plugin_version"),
    "IPluginRegistry": ("all_creators", "load_library"),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "IStreamReaderV2": ("read", "seek"),
    "IStreamWriter": ("write",),
    "ITensor": ("dtype", "name", "shape"),
    "ITimingCache": ("serialize",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "ParserError": ("desc", "local_function_stack", "local_function_stack_size", "node_name", "node_operator"),
    "Runtime": ("deserialize_cuda_engine",),
}  # fmt: skip

# Names of TensorRT for RTX that the datacenter bindings lack; the reverse is never used, since one body serves both.
RTX_ONLY = frozenset(
    {
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "ComputeCapability",
        "DynamicShapesKernelSpecializationStrategy",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IRuntimeCache.deserialize",
        "IRuntimeCache.serialize",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
    }
)
SINCE_11 = frozenset({"IAttention.key_value_lengths"})
"""Used where they are, not missed in 10.x."""
RUNTIME_CONFIG = ("ICudaEngine.create_runtime_config", "IRuntimeConfig.set_execution_context_allocation_strategy")
"""Used with TensorRT for RTX alone; that the datacenter bindings have them too is of no interest."""


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
