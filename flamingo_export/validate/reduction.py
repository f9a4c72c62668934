"""The smallest graph on which something still fails: Polygraphy's `debug reduce` over a bundle's functions and weights.

    graph of the bundle, or one LM layer with its gated block
      functions inlined, weights inside, shapes fixed      model.onnx
      every tensor of it for one set of inputs             values.npz
    polygraphy debug reduce, by halves and then node by node, as long as the check fails      reduced.onnx

A check is a command that is given a graph and exits with 1 where it still fails. Those that come with the package are in `reduction_check`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_export.bundle.manifest import GraphRecord, Manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.errors import ParityError, first_line, pip_install
from flamingo_export.estimates import GIB, reducing
from flamingo_export.machine import available_memory
from flamingo_export.progress import SILENT, Progress
from flamingo_export.specs import SubgraphSpec, TensorSpec, decoder_spec, subgraph_specs
from flamingo_export.validate.polygraphy_check import silenced
from flamingo_export.validate.reduction_check import FAILS, refused_operators
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.decoder_cuts import graph_bytes

MODEL, VALUES, REDUCED = "model.onnx", "values.npz", "reduced.onnx"
CHECKS, OWN = ("onnxruntime", "parser"), "flamingo_export.validate.reduction_check"
MOST_BYTES = 1 << 30
"""Of weights in fp32: graphs are saved as one message of protobuf, which has at most 2 GiB, and once more for each try."""
_SIZES = {"B": 1, "S": 4, "C": 16, "M": 1, "N": 1, "K": 1, "F": 1, "T": 1}


class Reduction(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. nodes: of the whole graph and of the smallest one that still fails; operators: of the latter, by how often; failing:
    whether the whole graph failed at all."""

    graph: str
    file: Path
    nodes: tuple[int, int]
    operators: dict[str, int]
    said: str
    failing: bool = True


def require_tools() -> None:
    """Raises ParityError with what to install where Polygraphy or what it reduces with is missing."""
    for module, name in (("polygraphy", "Polygraphy"), ("onnx_graphsurgeon", "onnx-graphsurgeon")):
        if importlib.util.find_spec(module) is None:
            raise ParityError(f"{name} is not installed: {pip_install('debug')}")


def reduce(
    bundle: Path, graph: str, *, out: Path, check: str = "onnxruntime", layer: int | None = None, progress: Progress = SILENT
) -> Reduction:
    """Reduces a graph of a bundle to the smallest one on which `check` fails, at `out`/reduced.onnx.

    graph: its name; layer: of the decoder, only this LM layer with its gated block.
    check: `onnxruntime` (its results as bundles are run, against those of each node by itself), `parser` (TensorRT for RTX's parser, of the
    lowered graph), or a command, which is given the path of a graph as its last argument and must exit with 0 where nothing is wrong with it.

    Raises ParityError where tools are missing, there is no such graph, or it is too large, with its estimate.
    """
    require_tools()
    manifest = open_bundle(bundle)
    record, spec = _chosen(manifest, graph, layer)
    _check_size(bundle, manifest, record, layer)
    command = _command(check, out)
    out.mkdir(parents=True, exist_ok=True)
    progress.note(f"{record.name}: functions are inlined, and every tensor is computed once")
    model = _whole(bundle, manifest, record, spec, layer, lowered=check == "parser")
    import onnx

    path, values = out / MODEL, _values(model, _feeds(spec, model))
    del model.graph.value_info[:]
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    )
    onnx.save(model, path)
    np.savez(out / VALUES, **values)
    tried = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    count = len(model.graph.node)
    if check in CHECKS and tried.returncode not in (0, FAILS):
        raise ParityError(f"the check {check} could not be run: {_last(tried.stderr)}")
    if tried.returncode == 0:
        return Reduction(
            graph=record.name, file=path, nodes=(count, count), operators={}, failing=False, said=_last(tried.stdout)
        )
    if check == "parser":  # pieces of a graph may be refused for being pieces
        command += ["--operators", ",".join(refused_operators(tried.stdout))]
    progress.note(f"{count} nodes fail ({_last(tried.stdout + tried.stderr)}); Polygraphy looks for the fewest that do")
    source = _reduced(path, out, command, "bisect", values)
    found = onnx.load(source)
    if len(found.graph.node) > 1:  # node by node finds what halves, in graphs with branches, do not
        with contextlib.suppress(ParityError):
            source = _reduced(source, out, command, "linear", values)
            found = onnx.load(source)
    said = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if said.returncode == 0:
        raise ParityError(
            f"the check fails on {path}, and not on what Polygraphy reduced it to ({source}): it fails by chance, or needs what lies around it"
        )
    return Reduction(
        graph=record.name,
        file=source,
        nodes=(count, len(found.graph.node)),
        operators=dict(Counter(node.op_type for node in found.graph.node)),
        said=_last(said.stdout + said.stderr),
    )


def _chosen(manifest: Manifest, graph: str, layer: int | None) -> tuple[GraphRecord, SubgraphSpec]:
    """The graph's record and contract. Raises ParityError."""
    media, config = manifest.precision.media, manifest.config
    if media == "fp8":
        raise ParityError(
            "the bundle keeps media in FP8, which ONNX Runtime's CPU cannot be fed. Reduce one that is built without."
        )
    if layer is not None:
        count = config.language_model.num_layers
        if not 0 <= layer < count:
            raise ParityError(f"there is no LM layer {layer}: {config.name} has 0 to {count - 1}")
        record = next(record for record, layers in manifest.decoder_graphs() if layer in layers)
        name = f"decoder.layer{layer}"
        record = msgspec.structs.replace(record, name=name, layers=(layer, layer + 1))
        return record, decoder_spec(config, range(layer, layer + 1), name=name, media=media)
    names = [record.name for record in manifest.graphs]
    if graph not in names:
        raise ParityError(f"the bundle has no graph {graph!r}. It has {', '.join(names)}.")
    record = manifest.graph(graph)
    if record.layers is None:
        return record, subgraph_specs(config, media=media)[graph]
    return record, decoder_spec(config, range(*record.layers), name=graph, media=media)


def _check_size(bundle: Path, manifest: Manifest, record: GraphRecord, layer: int | None) -> None:
    """Raises ParityError for a graph that is too large."""
    sizes = WeightIndex.read(bundle).sizes()
    read = graph_bytes(manifest.config, sizes, record)
    needed = reducing(read)
    if read <= MOST_BYTES and needed <= available_memory():
        return
    layers = manifest.config.language_model.num_layers
    decodes = record.layers is not None and layer is None
    each = (
        graph_bytes(manifest.config, sizes, msgspec.structs.replace(record, layers=(1, 2))) if decodes and layers > 2 else None
    )
    advice = ""
    if each is not None:
        fits = (
            ""
            if each <= MOST_BYTES
            else ", which is too large as well: take a model of the same kind with fewer or narrower layers"
        )
        advice = f" One of its {layers} LM layers reads {each / GIB:.2f} GiB: --layer 0{fits}."
    raise ParityError(
        f"{record.name} reads {read / GIB:.1f} GiB of weights. Polygraphy saves the graph with all of them once for each try: at most "
        f"{MOST_BYTES / GIB:.0f} GiB are taken, and it would want about {needed / GIB:.0f} GiB of memory, of which "
        f"{available_memory() / GIB:.0f} may be used.{advice}"
    )


def _whole(
    bundle: Path, manifest: Manifest, record: GraphRecord, spec: SubgraphSpec, layer: int | None, *, lowered: bool
) -> Any:
    """onnx.ModelProto: functions inlined, weights inside, inputs of fixed shapes."""
    import onnx
    import onnx_ir as ir
    from onnx import external_data_helper, inliner, numpy_helper

    from flamingo_export.backends.tensorrt.lowering.lower import lower
    from flamingo_export.validate.checks.layer_graph import layer_graph

    graph = ir.load(bundle / record.file) if layer is None else layer_graph(bundle, manifest, layer, name=record.name)
    ir.external_data.set_base_dir(graph.graph, bundle)
    sizes = dict(_SIZES)
    if lowered:
        sizes["C"] = manifest.limits.max_length
        compute = "fp32" if manifest.precision.storage == "fp32" else "fp16"
        lower(graph, compute=compute, capacity=sizes["C"], native_functions=frozenset())  # type: ignore[arg-type]
        for each in (graph.graph, *(function.graph for function in graph.functions.values())):
            for node in each:
                node.attributes.pop("TRT_decomposable", None)  # TensorRT's own, which ONNX Runtime does not know
    model = ir.serde.serialize_model(graph)
    external_data_helper.load_external_data_for_model(model, str(bundle))
    model = inliner.inline_local_functions(model)
    tables = {tensor.name: list(numpy_helper.to_array(tensor).shape) for tensor in model.graph.initializer}
    known = {tensor.name: tensor for tensor in spec.inputs}
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    for value in model.graph.input:
        shape = tables.get(value.name) or _shape(known[value.name], sizes)
        del value.type.tensor_type.shape.dim[:]
        for size in shape:
            value.type.tensor_type.shape.dim.add().dim_value = size
    kept = [value for value in model.graph.input if value.name not in tables]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for value in model.graph.output:
        for dim, size in zip(value.type.tensor_type.shape.dim, _shape(outputs[value.name], sizes), strict=True):
            dim.dim_value = size
    onnx.checker.check_model(model, full_check=False)
    return model


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> list[int]:
    return [size if isinstance(size, int) else sizes[size] for size in tensor.shape]


def _feeds(spec: SubgraphSpec, model: Any) -> dict[str, Any]:
    """Inputs of one call, seeded: ids and numbers that mean something, floats of spread 1."""
    from onnx import helper

    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if value.name == "mask":
            found[value.name] = np.broadcast_to(np.tri(shape[2], shape[3], dtype=np.bool_), shape)
        elif value.name in ("positions", "key_positions"):
            found[value.name] = np.broadcast_to(np.arange(shape[-1]), shape)
        elif value.name == "token_ids":
            found[value.name] = rng.integers(1, 8, shape)
        elif value.name in ("phi", "first_media", "lengths", "aspect_ratio_ids"):
            found[value.name] = np.ones(shape, np.int64)
        elif dtype == np.int64:
            found[value.name] = np.zeros(shape, np.int64)  # rows, slots and places: the first
        else:
            found[value.name] = rng.standard_normal(shape).astype(dtype)
    return found


def _values(model: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor of the graph by name, by ONNX Runtime without rewriting it."""
    import onnx
    import onnxruntime

    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    known = {value.name for value in marked.graph.output}
    for node in marked.graph.node:
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(marked.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime."):
            raise
        raise ParityError(f"ONNX Runtime cannot compute the graph's tensors: {first_line(error)}") from error
    return {**found, **feeds}


def _command(check: str, out: Path) -> list[str]:
    if check in CHECKS:
        return [sys.executable, "-m", OWN, check, str(out / VALUES)]
    try:
        command = shlex.split(check)
    except ValueError as error:
        raise ParityError(f"the check {check!r} is not a command: {error}") from error
    if command and shutil.which(command[0]) is None:
        raise ParityError(
            f"{command[0]} cannot be run: there is no such command. Name {' or '.join(CHECKS)}, or a command that is installed."
        )
    if not command:
        raise ParityError(
            f"the check is empty. Name {' or '.join(CHECKS)}, or a command that exits with 1 where a graph fails."
        )
    return command


def _reduced(source: Path, out: Path, command: Sequence[str], mode: str, values: Mapping[str, Any]) -> Path:
    """One run of Polygraphy's tool. Raises ParityError with what it said where it fails."""
    import onnx
    from polygraphy.json import save_json

    target, tried, inputs, replay = (out / name for name in ("found.onnx", "try.onnx", "inputs.json", "replay.json"))
    with silenced():
        save_json([{value.name: values[value.name] for value in onnx.load(source).graph.input}], str(inputs))
    program = [
        sys.executable,
        "-c",
        "import sys; from polygraphy.tools import main; sys.exit(main())",
        "debug",
        "reduce",
        str(source),
    ]
    how = ["--mode", mode, "--output", str(target), "--iter-artifact", str(tried), "--no-shape-inference"]
    how += ["--load-inputs", str(inputs), "--save-debug-replay", str(replay)]
    how += ["--fail-code", str(FAILS)] if OWN in command else []
    log = out / f"{mode}.log"
    with log.open("w") as file:
        done = subprocess.run(
            [*program, *how, "--check", *command, str(tried)],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        )
    for left in (tried, inputs, *out.glob("replay*.json")):
        left.unlink(missing_ok=True)
    if done.returncode != 0 or not target.is_file():
        target.unlink(missing_ok=True)
        raise ParityError(
            f"Polygraphy did not reduce the graph: {_last(log.read_text(errors='replace'))} All it said is in {log}."
        )
    return target.replace(out / REDUCED)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
