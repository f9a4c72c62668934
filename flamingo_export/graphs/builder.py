"""A small layer over onnx_ir: named scopes, operators that return their value, weights that stay in their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from flamingo_export.precision import ElementType
from flamingo_export.specs import FUNCTION_DOMAIN, KIND_DTYPES, SubgraphSpec, TensorSpec
from flamingo_export.weights import INPUT_SCALE, SCALE, Placed, WeightIndex
from flamingo_reference.config import FeedForward, Norm

OPSET = 24
IR_VERSION = 10

_KINDS = {kind: ir.DataType.from_numpy(dtype) for kind, dtype in KIND_DTYPES.items()}
_STORAGE: Mapping[ElementType, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}


class GraphBuilder:
    """Collects nodes and initializers; `model` closes the graph."""

    def __init__(self, index: WeightIndex | None = None, *, prefix: str = "") -> None:
        self._index = index
        self._prefix = [prefix] if prefix else []
        self.scopes: list[str] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._casts: dict[str, ir.Value] = {}
        self._names: set[str] = set()
        self._replaceable: dict[str, ir.Value] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named below `name`."""
        self.scopes.append(name)
        try:
            yield
        finally:
            self.scopes.pop()

    def _unique(self, name: str) -> str:
        full = "/".join([*self._prefix, *self.scopes, name])
        candidate, count = full, 1
        while candidate in self._names:
            count += 1
            candidate = f"{full}.{count}"
        self._names.add(candidate)
        return candidate

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Adds a node; returns its value, or a tuple of values where it has several."""
        full = self._unique(name or kind)
        suffixes = [f":{index}" for index in range(outputs)]  # apart from the weight of the same name
        values = [ir.Value(name=full + suffix) for suffix in suffixes]
        self._nodes.append(ir.node(kind, inputs, attributes=attributes, domain=domain, outputs=values, name=full))
        return values[0] if outputs == 1 else tuple(values)

    def constant(self, value: Any, *, dtype: Any = np.int64, name: str = "constant") -> ir.Value:
        """A small constant kept in the graph; equal ones are shared."""
        array = np.asarray(value, dtype=dtype)
        label = f"{name}/{array.dtype.name}{list(array.shape)}/{array.tobytes().hex()}".replace(" ", "")
        if label not in self._initializers:
            constant = ir.Value(
                name=label, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
            )
            constant.const_value = ir.tensor(array, name=label)
            self._initializers[label] = constant
        return self._initializers[label]

    def stored(self, name: str) -> ir.Value:
        """A weight in its storage type, left in its file."""
        if name not in self._initializers:
            if self._index is None:
                raise ValueError(f"a builder without an index has no weight {name}")
            self._initializers[name] = _external(name, self._index[name])
        return self._initializers[name]

    def replaceable(self, name: str, *, axis: int, size: str) -> ir.Value:
        """A weight in its storage type that whoever runs the graph may replace by its beginning along `axis`: an initializer and an input
        at once, of a size there that goes by the name of `size`."""
        value = self._replaceable[name] = self.stored(name)
        assert value.const_value is not None
        lengths: list[int | str] = list(value.const_value.shape.numpy())
        lengths[axis] = size
        value.shape = ir.Shape(lengths)
        return value

    def weight(self, name: str) -> ir.Value:
        """A weight in fp32: as stored, or behind a Cast that the runtime folds."""
        value = self.stored(name)
        if value.dtype == ir.DataType.FLOAT:
            return value
        if name not in self._casts:
            node = ir.node(
                "Cast",
                [value],
                attributes={"to": ir.DataType.FLOAT},
                outputs=[ir.Value(name=f"{name}/fp32")],
                name=f"{name}/cast",
            )
            self._nodes.append(node)
            self._casts[name] = node.outputs[0]
        return self._casts[name]

    def widened(self, x: ir.Value, weight: str, *, name: str) -> ir.Value:
        """x, which was taken out of a stored weight, in fp32."""
        if self.stored(weight).dtype == ir.DataType.FLOAT:
            return x
        return self.op("Cast", x, name=name, to=ir.DataType.FLOAT)  # type: ignore[no-any-return]

    def holds(self, name: str) -> bool:
        """Whether there is a weight of that name."""
        return self._index is not None and name in self._index

    def linear(self, x: ir.Value, weight: str, *, name: str, bias: bool = False) -> ir.Value:
        """x @ weight, plus the bias stored beside it where it has one. Of a quantised weight: between quantisation and its undoing,
        as backends look for it to make one kernel of all."""
        if self.holds(weight + SCALE):
            if self.holds(weight + INPUT_SCALE):
                x = self.rounded_to_fp8(x, self.stored(weight + INPUT_SCALE), name=f"{name}/input")
            product: ir.Value = self.op("MatMul", x, self._dequantised(weight), name=name)
        else:
            product = self.op("MatMul", x, self.weight(weight), name=name)
        return self.op("Add", product, self.weight(f"{weight}.bias"), name=f"{name}/bias") if bias else product

    def _dequantised(self, weight: str) -> ir.Value:
        """A quantised matrix behind its DequantizeLinear: scales of blocks along the input, or one for each output channel."""
        codes, scales = self.stored(weight), self.stored(weight + SCALE)
        assert codes.shape is not None
        assert scales.shape is not None
        along: dict[str, int] = {"axis": 1}
        if len(scales.shape) == 2:
            (rows, _), (blocks, _) = codes.shape.numpy(), scales.shape.numpy()
            along = {"axis": 0, "block_size": rows // blocks}
        node = ir.node(
            "DequantizeLinear",
            [codes, scales],
            attributes=along,
            outputs=[ir.Value(name=f"{weight}/dequantised")],
            name=f"{weight}/dequantise",
        )
        self._nodes.append(node)
        return node.outputs[0]

    def rounded_to_fp8(self, x: ir.Value, scale: ir.Value, *, name: str) -> ir.Value:
        """x rounded to E4M3 times `scale`, as a pair of nodes."""
        codes = self.to_fp8(x, scale, name=f"{name}/quantise")
        zero = self._initializers["fp8/zero"]
        return self.op("DequantizeLinear", codes, scale, zero, name=f"{name}/dequantise")  # type: ignore[no-any-return]

    def to_fp8(self, x: ir.Value, scale: ir.Value, *, name: str) -> ir.Value:
        """The E4M3 codes of x / `scale`; what is beyond their range becomes the largest."""
        if "fp8/zero" not in self._initializers:
            numbers = ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), dtype=ir.DataType.FLOAT8E4M3FN, name="fp8/zero")
            self._initializers["fp8/zero"] = ir.Value(
                name="fp8/zero", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT8E4M3FN), const_value=numbers
            )
        return self.op("QuantizeLinear", x, scale, self._initializers["fp8/zero"], name=name)  # type: ignore[no-any-return]

    def norm(
        self, x: ir.Value, weight: str, *, name: str, eps: float = 1e-5, kind: Norm = "layer_norm", bias: bool = True
    ) -> ir.Value:
        """A norm over the last axis. bias: of a LayerNorm; RMSNorm has none."""
        operator = "RMSNormalization" if kind == "rms_norm" else "LayerNormalization"
        scales = [self.weight(f"{weight}/weight")]
        if kind == "layer_norm" and bias:
            scales.append(self.weight(f"{weight}/bias"))
        normed: ir.Value = self.op(operator, x, *scales, name=name, axis=-1, epsilon=eps)
        return normed

    def activation(self, x: ir.Value, kind: FeedForward) -> ir.Value:
        """What a feed-forward layer applies between its matrices; for swiglu x holds both projections, the one under the swish first."""
        if kind == "swiglu":
            gate, up = self.op("Split", x, name="swiglu/split", outputs=2, axis=-1, num_outputs=2)
            return self.op("Mul", self._swish(gate, name="swiglu/swish"), up, name="swiglu")  # type: ignore[no-any-return]
        if kind == "gelu":
            return self.op("Gelu", x, name="gelu")  # type: ignore[no-any-return]
        if kind == "quick_gelu":
            return self._swish(x, name="quick_gelu", slope=1.702)
        positive: ir.Value = self.op("Relu", x, name="relu")
        return positive if kind == "relu" else self.op("Mul", positive, positive, name="square")

    def _swish(self, x: ir.Value, *, name: str, slope: float = 1.0) -> ir.Value:
        """x * sigmoid(slope * x). Not the operator Swish: ONNX Runtime's kernel of it took six times as long."""
        scaled = x if slope == 1.0 else self.op("Mul", x, self.constant(slope, dtype=np.float32), name=f"{name}/slope")
        swished: ir.Value = self.op("Mul", x, self.op("Sigmoid", scaled, name=f"{name}/sigmoid"), name=name)
        return swished

    def feed_forward(self, normed: ir.Value, weights: str, kind: FeedForward, *, bias: bool = False) -> ir.Value:
        """The feed-forward half of a layer, without its norm and residual."""
        up = self.linear(normed, f"{weights}/ffw_up", name="ffw_up", bias=bias)
        return self.linear(self.activation(up, kind), f"{weights}/ffw_down", name="ffw_down", bias=bias)

    def reshape(self, x: ir.Value, shape: Sequence[int], *, name: str = "reshape") -> ir.Value:
        """0 keeps a size of x at that place, -1 is what is left."""
        reshaped: ir.Value = self.op("Reshape", x, self.constant(list(shape)), name=name)
        return reshaped

    def heads(self, x: ir.Value, num_heads: int, head_size: int, *, name: str = "heads") -> ir.Value:
        """[B, S, H * D] -> [B, H, S, D]."""
        split = self.reshape(x, [0, 0, num_heads, head_size], name=f"{name}/split")
        moved: ir.Value = self.op("Transpose", split, name=name, perm=[0, 2, 1, 3])
        return moved

    def merge_heads(self, x: ir.Value, inner: int, *, name: str = "merge_heads") -> ir.Value:
        """[B, H, S, D] -> [B, S, H * D]."""
        moved = self.op("Transpose", x, name=name, perm=[0, 2, 1, 3])
        return self.reshape(moved, [0, 0, inner], name=f"{name}/join")

    def function(
        self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], *, attributes: Sequence[ir.Attr]
    ) -> ir.Function:
        """Closes a model-local function: the seam a backend may replace. Constants become nodes, as functions hold no initializers."""
        constants = [
            ir.node("Constant", [], attributes={"value": value.const_value}, outputs=[value], name=value.name)
            for value in self._initializers.values()
        ]
        for value in self._initializers.values():
            value.const_value = None
        graph = ir.Graph(inputs, outputs, nodes=[*constants, *self._nodes], opset_imports={"": OPSET}, name=name)
        return ir.Function(FUNCTION_DOMAIN, name, "", graph=graph, attributes=attributes)

    def model(
        self,
        spec: SubgraphSpec,
        inputs: Mapping[str, ir.Value],
        outputs: Mapping[str, ir.Value],
        functions: Sequence[ir.Function] = (),
    ) -> ir.Model:
        """Closes the graph with the inputs and outputs of its contract, and the weights that may be replaced."""
        for tensor in spec.outputs:
            value = outputs[tensor.name]
            value.name = tensor.name
            value.shape, value.type = _shape(tensor), ir.TensorType(_KINDS[tensor.kind])
        imports = {"": OPSET} | ({FUNCTION_DOMAIN: 1} if functions else {})
        graph = ir.Graph(
            [*(inputs[tensor.name] for tensor in spec.inputs), *self._replaceable.values()],
            [outputs[tensor.name] for tensor in spec.outputs],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=imports,
            name=spec.name.replace(".", "_"),
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="flamingo-export", functions=list(functions))


def graph_inputs(spec: SubgraphSpec) -> dict[str, ir.Value]:
    """A value for each input of the contract."""
    return {
        tensor.name: ir.Value(name=tensor.name, shape=_shape(tensor), type=ir.TensorType(_KINDS[tensor.kind]))
        for tensor in spec.inputs
    }


def _shape(tensor: TensorSpec) -> ir.Shape:
    return ir.Shape(list(tensor.shape))


def _external(name: str, placed: Placed) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(placed.shape), type=ir.TensorType(_STORAGE[placed.storage]))
    value.const_value = ir.ExternalTensor(
        placed.file,
        placed.offset,
        placed.length,
        _STORAGE[placed.storage],
        shape=ir.Shape(placed.shape),
        name=name,
    )
    return value
