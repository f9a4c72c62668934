"""What an engine of a bundle must be: its record, its inputs and outputs, its profiles; and the command that makes one that is."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from flamingo_export.backends.tensorrt.dtypes import ElementType, element_type
from flamingo_export.backends.tensorrt.lowering.candidates import with_candidates, without_candidates
from flamingo_export.backends.tensorrt.lowering.shapes import CAPACITY, Profile, profiles, shape_of
from flamingo_export.bundle.manifest import EngineRecord, FileRecord, GraphRecord, Manifest
from flamingo_export.bundle.verify import is_intact
from flamingo_export.errors import CheckpointError, IncompatibleEngine
from flamingo_export.machine import user_cache
from flamingo_export.precision import StorageType
from flamingo_export.quantize.policies import POLICIES, for_model, preset
from flamingo_export.sources import CheckpointSource
from flamingo_export.sources.choice import nano_checkpoint
from flamingo_export.sources.origin import source_digest
from flamingo_export.specs import SubgraphSpec, TensorSpec, decoder_spec, subgraph_specs
from flamingo_export.weights.calibration_table import CALIBRATION_FILE


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs, outputs and profiles of an engine, the capacity of its caches, the type of its floats.

    offered: the contract that callers see. It has no candidates where the engine's leave out other tokens than the model bans.
    """

    spec: SubgraphSpec
    profiles: tuple[Profile, ...]
    capacity: int
    compute: StorageType
    offered: SubgraphSpec

    def element(self, tensor: TensorSpec) -> ElementType:
        """The type of a tensor in the engine."""
        return element_type(tensor.kind, self.compute)

    def shape(self, tensor: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape of a tensor when its symbols have these sizes."""
        return shape_of(tensor, {CAPACITY: self.capacity, **sizes})

    def bounds(self, tensor: TensorSpec, profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, usual and largest shape of an input in a profile."""
        least, usual, most = (
            self.shape(tensor, {symbol: getattr(bounds, which) for symbol, bounds in profile.bounds.items()})
            for which in ("least", "usual", "most")
        )
        return least, usual, most


def resident_bytes(contract: Contract) -> tuple[int, int]:
    """Bytes that calls keep on the device: of the media bank, all its rows, and of one row of the caches. Zero for what is not a decoder."""
    rows = max((profile.bounds["N"].most for profile in contract.profiles if "N" in profile.bounds), default=0)
    caches = set(contract.spec.aliases.values())
    found = [0, 0]
    for tensor in contract.spec.inputs if caches else ():
        if tensor.name in caches or tensor.name.startswith(("media_k.", "media_v.")):
            size = math.prod(contract.shape(tensor, {"N": rows, "B": 1})) * contract.element(tensor).size
            found[tensor.name in caches] += size
    return found[0], found[1]


def engine_spec(manifest: Manifest, graph: GraphRecord) -> SubgraphSpec:
    """The contract of a graph's engine: that of the graph, and the candidates beside its logits."""
    if graph.layers is None:
        spec = subgraph_specs(manifest.config, media=manifest.precision.media)[graph.name]
    else:
        spec = decoder_spec(manifest.config, range(*graph.layers), name=graph.name, media=manifest.precision.media)
    return with_candidates(spec, manifest.limits.beams + len(manifest.config.tokens.stops))


def contract_of(manifest: Manifest, graph: GraphRecord, record: EngineRecord | None = None) -> Contract:
    """What the engine of a graph must be. Raises BuildError if the manifest's limits contradict each other.

    record: the engine that there is; None for one that is made of this manifest.
    """
    spec, banned = engine_spec(manifest, graph), manifest.config.banned_logits
    baked = banned if record is None else record.banned or banned[:1]  # earlier records: `<image>` and no other
    return Contract(
        spec=spec,
        profiles=profiles(spec, manifest.limits),
        capacity=manifest.limits.max_length,
        compute=manifest.precision.storage,
        offered=spec if set(baked) == set(banned) else without_candidates(spec),
    )


def rebuild_command(bundle: Path, manifest: Manifest, backend: str, target: str) -> str:
    """The command that builds the bundle's engines anew for a GPU. FOLDER and FILE stand for what the bundle does not know the name of."""
    source = manifest.source
    if source.kind == "random":
        model = f"--size {manifest.config.name}" + (f" --seed {source.seed}" if source.seed is not None else "")
    elif manifest.config.name == "nano" and source.sha256 == _shipped_digest():
        model = "--size nano"
    else:
        model = "--checkpoint FOLDER"
    limits, parts = manifest.limits, sum(graph.layers is not None for graph in manifest.graphs)
    cut = f" --parts {parts}" if parts > 1 else ""
    # TensorRT itself builds for the GPU it runs on, and takes no target.
    where = f" --target {target}" if backend == "tensorrt-rtx" else ""
    return (
        f"flamingo-export build {model} --storage {manifest.precision.storage}{_policy_options(bundle, manifest)} "
        f"--max-length {limits.max_length} --max-batch {limits.batch}{cut} --backend {backend}{where} "
        f"--out {shlex.quote(str(bundle))} --overwrite"
    )


@functools.cache
def _shipped_digest() -> str | None:
    """Of the weights that `--size nano` means, None where they are not installed."""
    try:
        return source_digest(CheckpointSource(nano_checkpoint()))
    except CheckpointError:
        return None


def _policy_options(bundle: Path, manifest: Manifest) -> str:
    """Those of a build that quantises as this bundle is quantised, with the ranges that it has."""
    policy, calibration = manifest.precision.policy, manifest.calibration
    if policy is None:
        return ""
    named = policy.name in POLICIES and policy == for_model(preset(policy.name), manifest.config)
    options = f" --{policy.name}" if named else " --policy FILE"
    if calibration is not None and calibration.origin == "given":
        options += f" --calibration {shlex.quote(str(bundle / CALIBRATION_FILE))}"
    elif policy.needs_ranges and calibration is not None and calibration.origin == "none":
        options += " --uncalibrated"
    return options


def find_record(bundle: Path, manifest: Manifest, graph: GraphRecord, backend: str, target: str) -> EngineRecord:
    """The engine of a graph for this backend and GPU. Raises IncompatibleEngine saying which there are."""
    records = [record for record in manifest.engines if record.graph == graph.name and record.backend == backend]
    for record in records:
        if record.target == target:
            return record
    found = f"for {', '.join(record.target for record in records)}" if records else "none"
    raise IncompatibleEngine(
        f"{bundle} has no {backend} engine of {graph.name} for this machine's GPU ({target}), it has {found}. "
        f"Build it: {rebuild_command(bundle, manifest, backend, target)}"
    )


def check_record(bundle: Path, manifest: Manifest, record: EngineRecord, version: str) -> Path:
    """The engine's file, if version, size and digest are those of the record. Raises IncompatibleEngine."""
    advice = f"Build it again: {rebuild_command(bundle, manifest, record.backend, record.target)}"
    if record.tool_version != version:
        raise IncompatibleEngine(
            f"{record.file} was built by {record.backend} {record.tool_version}, here is {version}. Install that version, or: {advice}"
        )
    if record.compute is not None and record.compute != manifest.precision.storage:
        raise IncompatibleEngine(
            f"{record.file} computes in {record.compute}, the bundle's weights are {manifest.precision.storage}. {advice}"
        )
    path = bundle / record.file
    if not is_intact(bundle, FileRecord(path=record.file, size=record.size, sha256=record.sha256 or "")):
        raise IncompatibleEngine(f"{path} is not the file that was built: it is missing or was altered. {advice}")
    return path


def check_engine(trt: ModuleType, engine: Any, contract: Contract) -> None:
    """Raises IncompatibleEngine unless inputs, outputs, types, aliases and profiles of a loaded engine are those of the contract."""
    faults = [*_tensors(trt, engine, contract), *_profiles(engine, contract)]
    if faults:
        raise IncompatibleEngine("; ".join(faults))


def _tensors(trt: ModuleType, engine: Any, contract: Contract) -> Iterator[str]:
    spec = contract.spec
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name) for name in names}
    for mode, what, tensors in (
        (trt.TensorIOMode.INPUT, "input", spec.inputs),
        (trt.TensorIOMode.OUTPUT, "output", spec.outputs),
    ):
        found, wanted = {name for name in names if modes[name] == mode}, {tensor.name: tensor for tensor in tensors}
        for name in sorted(found ^ wanted.keys()):
            yield f"{what} {name} is {'not in the contract' if name in found else 'missing'}"
        for name in sorted(found & wanted.keys()):
            tensor = wanted[name]
            element = contract.element(tensor)
            dtype = engine.get_tensor_dtype(name)
            if dtype != getattr(trt.DataType, element.trt):
                yield f"{what} {name} is {dtype}, expected {element.trt}"
            fixed = {symbol: -1 for dim in tensor.shape if isinstance(dim, str) and dim != CAPACITY for symbol in (dim,)}
            shape, expected = tuple(engine.get_tensor_shape(name)), contract.shape(tensor, fixed)
            if shape != expected:
                yield f"{what} {name} has shape {shape}, expected {expected}"
    for output, source in spec.aliases.items():
        if output in modes and engine.get_aliased_input_tensor(output) != source:
            yield f"{output} is not {source} updated in place"


def _profiles(engine: Any, contract: Contract) -> Iterator[str]:
    if engine.num_optimization_profiles != len(contract.profiles):
        yield f"{engine.num_optimization_profiles} profiles, expected {len(contract.profiles)}"
        return
    present = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for index, profile in enumerate(contract.profiles):
        for tensor in contract.spec.inputs:
            if tensor.name not in present:
                continue
            found = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, index))
            wanted = contract.bounds(tensor, profile)
            if found != wanted:
                yield f"{tensor.name} takes {found[0]} to {found[2]} in profile {profile.name}, expected {wanted[0]} to {wanted[2]}"


def runtime_cache_file(record: EngineRecord) -> Path | None:
    """Where kernels compiled for an engine on this machine are kept; None where the user has no cache folder."""
    name = f"{record.backend}-{record.tool_version}-{record.target}-{(record.sha256 or record.graph)[:16]}.cache"
    folder = user_cache("kernels")
    return folder / name if folder else None
