"""A lowered graph computed by PyTorch, node by node, where its tensors lie: the engine that a machine without TensorRT can run.

Sizes and other integers that shapes are made of stay on the host, as TensorRT keeps shape tensors, so nothing waits for the device and a
run of fixed shapes may be captured in a CUDA graph once it has been run. Caches are updated in place, as TensorScatter's engines do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[..., Tensor]
"""(q [B,S,H,D], k, v [N,H,R,D], media_rows, phi, k_scale, v_scale) -> [B,S,H,D]; the scales are None unless K and V are FP8."""
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
}
LARGEST_E4M3 = 448.0


class UnknownOperator(Exception):
    """The graph has a node that is not computed here."""


def as_torch(tensor: ir.TensorProtocol) -> Tensor:
    """A tensor of a graph on the host. Types that numpy lacks go over by their bits."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UnknownOperator(f"a tensor of type {tensor.dtype}")
    array = np.ascontiguousarray(tensor.numpy())
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):
        bits = array.view(np.int16 if dtype is torch.bfloat16 else np.uint8)
        return torch.from_numpy(bits.copy()).view(dtype).reshape(tuple(array.shape))
    return torch.from_numpy(array.copy())


class TorchGraph:
    """A graph with its weights on a device. `attend` computes calls of PhiCrossAttention that have no body."""

    def __init__(self, model: ir.Model, device: torch.device, attend: Attend | None = None) -> None:
        self._model, self.device, self.attend = model, device, attend
        self._functions = {function.identifier(): function for function in model.functions.values()}
        self._moved: dict[tuple[Any, ...], Tensor] = {}
        self._weights: dict[ir.Value, Tensor] = {}
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            self._weights[value] = self._placed(as_torch(value.const_value))
        self._constants: dict[ir.Node, Tensor] = {}

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; an output that a TensorScatter gives is the cache that was fed."""
        values: dict[ir.Value, Tensor] = dict(self._weights)
        for value in self._model.graph.inputs:
            if value not in values:
                values[value] = feeds[str(value.name)]
        self._run(self._model.graph, values)
        return {str(value.name): values[value] for value in self._model.graph.outputs}

    def _run(self, graph: Any, values: dict[ir.Value, Tensor]) -> None:
        for node in graph:
            given = [None if value is None else values[value] for value in node.inputs]
            found = self._compute(node, given)
            for value, result in zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False):
                values[value] = result

    def _compute(self, node: ir.Node, given: list[Any]) -> Tensor | tuple[Tensor, ...]:
        function = self._functions.get(node.op_identifier())
        if function is not None:
            inner = dict(zip(function.inputs, given, strict=True))
            self._run(function, inner)
            results = tuple(inner[value] for value in function.outputs)
            return results if len(results) > 1 else results[0]
        if node.op_type == "PhiCrossAttention" and self.attend is not None:
            k_scale, v_scale = given[5:] if len(given) > 5 else (None, None)
            return self.attend(*given[:5], k_scale, v_scale)
        if node.op_type == "Constant":
            if node not in self._constants:
                self._constants[node] = self._constant(node)
            return self._constants[node]
        operator = _OPERATORS.get(node.op_type)
        if operator is None or node.domain not in ("", "ai.onnx"):
            raise UnknownOperator(f"{node.domain}::{node.op_type}, node {node.name}")
        return operator(_Attributes(node), *self._together(node.op_type, given))

    def _constant(self, node: ir.Node) -> Tensor:
        (attribute,) = node.attributes.values()
        if attribute.name == "value":
            return self._placed(as_torch(attribute.as_tensor()))
        dtype = torch.float32 if "float" in attribute.name else torch.int64
        return self._placed(torch.tensor(attribute.value, dtype=dtype))

    def _placed(self, tensor: Tensor) -> Tensor:
        """Floats on the device; integers and truths on the host, until something on the device meets them."""
        return tensor.to(self.device) if tensor.is_floating_point() else tensor

    def _together(self, kind: str, given: list[Any]) -> list[Any]:
        """All on the device where one is, but for what an operator reads as sizes. What is moved is kept: a capture may move nothing."""
        sizes = _SIZES.get(kind, ())
        values = [x for index, x in enumerate(given) if index not in sizes and isinstance(x, Tensor)]
        if self.device.type == "cpu" or all(x.device.type == "cpu" for x in values):
            return given
        return [
            self._on_device(x) if isinstance(x, Tensor) and index not in sizes and x.device.type == "cpu" else x
            for index, x in enumerate(given)
        ]

    def _on_device(self, tensor: Tensor) -> Tensor:
        key = (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self._moved:
            self._moved[key] = tensor.to(self.device)
        return self._moved[key]


class _Attributes:
    """Attributes of a node with their defaults."""

    def __init__(self, node: ir.Node) -> None:
        self._node = node

    def __call__(self, name: str, default: Any = None) -> Any:
        found = self._node.attributes.get(name)
        return default if found is None else found.value

    @property
    def num_outputs(self) -> int:
        return len(self._node.outputs)


def _ints(tensor: Tensor) -> list[int]:
    """Sizes, which are on the host."""
    if tensor.device.type != "cpu":
        raise UnknownOperator("sizes that are worked out on the device")
    found: list[int] = tensor.reshape(-1).tolist()
    return found


def _reshape(a: _Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.shape[axis] if size == 0 and not a("allowzero", 0) else size for axis, size in enumerate(_ints(shape))]
    return x.reshape(sizes)


def _slice(
    a: _Attributes, x: Tensor, starts: Tensor, stops: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    begins, ends = _ints(starts), _ints(stops)
    dims = _ints(axes) if axes is not None else list(range(len(begins)))
    strides = _ints(steps) if steps is not None else [1] * len(begins)
    where = [slice(None)] * x.dim()
    for dim, begin, end, stride in zip(dims, begins, ends, strides, strict=True):
        where[dim] = slice(begin, None if end >= x.shape[dim] else end, stride)
    return x[tuple(where)]


def _gather(a: _Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a("axis", 0) % x.dim()
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_nd(a: _Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """One index a batch row: data [B, S, ...], indices [B, ..., 1]."""
    if a("batch_dims", 0) != 1 or indices.shape[-1] != 1:
        raise UnknownOperator(f"GatherND with batch_dims {a('batch_dims', 0)} and indices {tuple(indices.shape)}")
    rows = torch.arange(x.shape[0], device=x.device).reshape(-1, *[1] * (indices.dim() - 2))
    return x[rows, indices[..., 0]]


def _expand(a: _Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(_ints(shape))))


def _unsqueeze(a: _Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: _Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _split(a: _Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a("axis", 0)
    parts: int | list[int] = math.ceil(x.shape[axis] / a.num_outputs) if sizes is None else _ints(sizes)
    return torch.split(x, parts, axis)


def _shape(a: _Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a("start", 0) : a("end")], dtype=torch.int64)


def _range(a: _Attributes, start: Tensor, stop: Tensor, step: Tensor) -> Tensor:
    return torch.arange(int(start), int(stop), int(step))


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(a: _Attributes, x: Tensor, axes: Tensor) -> Tensor:
        return function(x, dim=tuple(_ints(axes)), keepdim=bool(a("keepdims", 1)))

    return reduce


def _layer_norm(a: _Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = a("axis", -1) % x.dim()
    return F.layer_norm(x, x.shape[axis:], scale.to(x.dtype), None if bias is None else bias.to(x.dtype), a("epsilon", 1e-5))


def _rms_norm(a: _Attributes, x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + a("epsilon", 1e-5)) * scale.to(x.dtype)


def _attention(a: _Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries [B,H,S,D], keys and values [B,G,C,D]; a mask says True where a key is seen, or is added to the scores."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a("scale"), enable_gqa=q.shape[1] != k.shape[1])


def _tensor_scatter(a: _Attributes, cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    axis = a("axis", -2) % cache.dim()
    slots = write_index[:, None] + torch.arange(new.shape[axis], device=cache.device)
    sizes = [1] * cache.dim()
    sizes[0], sizes[axis] = slots.shape
    return cache.scatter_(axis, slots.reshape(sizes).expand_as(new), new)


def _pads(a: _Attributes, dims: int) -> list[int]:
    """As torch's F.pad takes them: the last dimension first, before and after."""
    pads = a("pads", [0] * 2 * dims)
    return [pads[axis + side * dims] for axis in reversed(range(dims)) for side in (0, 1)]


def _conv(a: _Attributes, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    padded = F.pad(x, _pads(a, 2))
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(
        padded, kernel.to(x.dtype), bias, tuple(a("strides", (1, 1))), 0, tuple(a("dilations", (1, 1))), a("group", 1)
    )


def _average_pool(a: _Attributes, x: Tensor) -> Tensor:
    if any(_pads(a, 2)):
        raise UnknownOperator("AveragePool with padding")
    return F.avg_pool2d(
        x, tuple(a("kernel_shape")), tuple(a("strides", (1, 1))), 0, bool(a("ceil_mode", 0)), bool(a("count_include_pad", 0))
    )


def _top_k(a: _Attributes, x: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    values, ids = torch.topk(x, _ints(count)[0], a("axis", -1), bool(a("largest", 1)), bool(a("sorted", 1)))
    return values, ids


def _quantize(a: _Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    dtype = zero.dtype if zero is not None else DTYPES.get(ir.DataType(a("output_dtype", 0)))
    if dtype is not torch.float8_e4m3fn:
        raise UnknownOperator(f"QuantizeLinear to {dtype}")
    return (x.float() / scale.float()).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(dtype)


def _dequantize(a: _Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if scale.numel() != 1 or x.dtype is not torch.float8_e4m3fn:
        raise UnknownOperator(f"DequantizeLinear of {x.dtype} with {scale.numel()} scales")
    return (x.float() * scale.float()).to(scale.dtype)


def _cast(a: _Attributes, x: Tensor) -> Tensor:
    return x.to(DTYPES[ir.DataType(a("to"))])


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, *tensors: function(*tensors)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Of any number of tensors."""

    def fold(a: _Attributes, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return fold


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


_SIZES: dict[str, Sequence[int]] = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,), "TopK": (1,),
    "ReduceMax": (1,), "ReduceSum": (1,),
}  # fmt: skip
"""Inputs that are sizes: read on the host, whatever lies where."""
_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _elementwise(torch.add),
    "Attention": _attention,
    "AveragePool": _average_pool,
    "Cast": _cast,
    "CastLike": _elementwise(lambda x, like: x.to(like.dtype)),
    "Concat": lambda a, *tensors: torch.cat(tensors, a("axis")),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(_divide),
    "Equal": _elementwise(torch.eq),
    "Exp": _elementwise(torch.exp),
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": lambda a, x, indices: x.gather(a("axis", 0), indices),
    "GatherND": _gather_nd,
    "Gelu": lambda a, x: F.gelu(x, approximate=a("approximate", "none")),
    "GlobalAveragePool": lambda a, x: x.mean((2, 3), keepdim=True),
    "Greater": _elementwise(torch.gt),
    "LayerNormalization": _layer_norm,
    "Less": _elementwise(torch.lt),
    "Log": _elementwise(torch.log),
    "MatMul": _elementwise(torch.matmul),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Mul": _elementwise(torch.mul),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Range": _range,
    "ReduceMax": _reduced(torch.amax),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _elementwise(torch.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub),
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
    "Transpose": lambda a, x: x.permute(tuple(a("perm", tuple(reversed(range(x.dim())))))),
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(torch.where),
}
