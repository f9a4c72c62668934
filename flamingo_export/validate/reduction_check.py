"""Checks for `debug --reduce`, as commands: exit code 9 where a graph still fails, and no other, so that a check which does not run is noticed.

python -m flamingo_export.validate.reduction_check onnxruntime values.npz graph.onnx   the rewritten graph's results against `values`
python -m flamingo_export.validate.reduction_check parser values.npz graph.onnx        whether TensorRT for RTX's parser takes it

With `--operators Det,Mod` before the graph only a refusal of one of these counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FAILS = 9
MOST = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest difference over the largest number of an output, by its type: a graph that computes something else is far beyond it."""


def main(arguments: Sequence[str]) -> int:
    check, values, *others, graph = arguments
    said = by_parser(Path(graph)) if check == "parser" else by_values(Path(graph), Path(values))
    operators = set(others[1].split(",")) - {""} if others else set()
    if operators and not operators.intersection(refused_operators(said)):
        print(f"none of {', '.join(sorted(operators))} is refused: {said}")
        return 0
    print(said or "nothing is wrong with it")
    return FAILS if said else 0


def refused_operators(said: str) -> list[str]:
    """The operators that a refusal of the parser names."""
    return re.findall(r"node \S+ \((\w+)\)", said)


def by_values(graph: Path, values: Path) -> str:
    """What ONNX Runtime, which rewrites graphs before it runs them, computes otherwise than `values` has it, tensors by name; empty where
    nothing differs. A graph that it cannot run is none that differs: reducing leaves some without what they need."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with np.load(values) as known:
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            names = [value.name for value in session.get_outputs()]
            found = session.run(names, {value.name: known[value.name] for value in session.get_inputs()})
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime."):
                raise
            print(f"it does not run: {error}")
            return ""
        for name, value in zip(names, found, strict=True):
            if (text := difference(np.asarray(value), known[name])) is not None:
                return f"{name}: {text}"
    return ""


def difference(found: Any, wanted: Any) -> str | None:
    """What is wrong with a result; None where it is right."""
    if found.shape != wanted.shape:
        return f"shape {found.shape}, expected {wanted.shape}"
    if found.dtype.kind not in "fV":
        return None if np.array_equal(found, wanted) else "other numbers"
    one, other = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(other)
    if not (np.isfinite(one[finite]).all() and np.array_equal(one[~finite], other[~finite], equal_nan=True)):
        return "infinities or NaN"
    largest = max(float(np.abs(other[finite]).max(initial=0.0)), 1e-6)
    share = float(np.abs(one[finite] - other[finite]).max(initial=0.0)) / largest
    return f"differs by {share:.2g} of the largest number" if share > MOST.get(str(found.dtype), 1e-3) else None


def by_parser(graph: Path) -> str:
    """What TensorRT for RTX's parser refuses; empty where it takes the graph. No GPU is needed."""
    from flamingo_export.backends.tensorrt import library
    from flamingo_export.backends.tensorrt.log import BuilderMessages, listening, started
    from flamingo_export.backends.tensorrt.parsing import parse
    from flamingo_export.errors import BuildError

    trt = library.load(library.RTX)
    messages = BuilderMessages()
    with listening(trt, messages) as logger:
        builder = started(trt, trt.Builder, logger, messages)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        try:
            parse(trt, network, logger, graph, messages)
        except BuildError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    from flamingo_export.errors import FlamingoExportError

    try:
        sys.exit(main(sys.argv[1:]))
    except FlamingoExportError as error:
        sys.exit(str(error))
