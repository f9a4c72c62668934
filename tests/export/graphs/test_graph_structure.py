"""What every portable graph promises to its readers: contract, names, operators, the seam, size, and that no weight is loaded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.precision import default_precision
from flamingo_export.specs import SUBGRAPHS, SubgraphSpec, decoder_spec, subgraph_specs
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import SIZES, ModelConfig
from flamingo_reference.names import parameter_counts

TYPES = {"float": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, "bool": onnx.TensorProto.BOOL}


def planned(config: ModelConfig) -> WeightIndex:
    return WeightIndex.planned(config, default_precision(sum(parameter_counts(config).values())))


def assert_contract(model: onnx.ModelProto, spec: SubgraphSpec) -> None:
    stored = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    for values, tensors in ((inputs, spec.inputs), (model.graph.output, spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            kind = value.type.tensor_type
            assert kind.elem_type == TYPES[tensor.kind]
            assert tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim) == tensor.shape
    for value in model.graph.input:
        if value.name in stored:  # the default of an input: a table that may be given cut
            assert value.name.endswith("/self_attention/distances")
            shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert shape == [*stored[value.name][:2], "distance_blocks", 128]


def every_node(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


@pytest.mark.slow
@pytest.mark.parametrize("size", list(SIZES))
def test_graphs_of_every_size_are_small_and_load_no_weight(size: str, tmp_path: Path) -> None:
    config = SIZES[size]
    tracemalloc.start()
    index = planned(config)
    for name in SUBGRAPHS:
        save_graph(build_graph(config, name, index), tmp_path / f"{name}.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    for name in SUBGRAPHS:
        path = tmp_path / f"{name}.onnx"
        assert path.stat().st_size < 5_000_000
        model = onnx.load(path, load_external_data=False)
        assert (model.ir_version, {item.domain: item.version for item in model.opset_import}[""]) == (10, 24)
        assert_contract(model, subgraph_specs(config)[name])
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["location"].startswith("weights/")
                assert entries["location"].endswith(".safetensors")
                assert int(entries["length"]) == index[tensor.name].length
            else:
                assert tensor.ByteSize() < 2000, tensor.name


def test_every_weight_is_used_by_one_graph() -> None:
    config = SIZES["nano"]
    index = planned(config)
    used = [
        name
        for subgraph in SUBGRAPHS
        for name in build_graph(config, subgraph, index).graph.initializers
        if "constant" not in name
    ]
    assert sorted(used) == sorted(index)


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_the_checker_and_shape_inference_accept_them(tiny_bundle: Path, name: str) -> None:
    path = tiny_bundle / f"{name}.onnx"
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), check_type=True, strict_mode=True)
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    # What a model-local function says of its outputs is known only to those who inline it.
    missing = {
        output
        for node in inferred.graph.node
        for output in node.output
        if output not in known and node.domain == "" and "cross_attention" not in node.name
    }
    assert not missing


@pytest.mark.parametrize("layers", [range(27), range(27, 54), range(54, 80)])
def test_parts_keep_the_numbers_of_the_whole(layers: range, tmp_path: Path) -> None:
    config = SIZES["80b"]
    save_graph(build_graph(config, "decoder.0", planned(config), layers=layers), tmp_path / "part.onnx")
    model = onnx.load(tmp_path / "part.onnx", load_external_data=False)
    assert_contract(model, decoder_spec(config, layers, name="decoder.0"))
    whole = {node.name for node in build_graph(config, "decoder", planned(config)).graph}
    assert {node.name for node in model.graph.node} - whole <= {"decoder/hidden_out"}


def test_unknown_subgraphs_are_refused() -> None:
    with pytest.raises(ValueError, match="no subgraph 'encoder', expected one of vision_encoder"):
        build_graph(SIZES["nano"], "encoder", planned(SIZES["nano"]))


class TestDecoder:
    @pytest.fixture(scope="class")
    def model(self, tiny_bundle: Path) -> onnx.ModelProto:
        return onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False)

    def test_nodes_and_values_have_names_of_their_own(self, model: onnx.ModelProto) -> None:
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert "decoder/layer.2/cross_attention/q_proj" in names
        assert "decoder/layer.1/self_attention/attention" in names
        assert all(name.startswith("decoder/") for name in names)
        made = [output for node in model.graph.node for output in node.output]
        made += {value.name for value in (*model.graph.initializer, *model.graph.input)}  # a table is both
        assert len(set(made)) == len(made)

    def test_the_function_is_kept_and_names_its_plugin(self, model: onnx.ModelProto) -> None:
        (function,) = model.functions
        assert (function.domain, function.name) == ("flamingo", "PhiCrossAttention")
        assert list(function.input) == ["q", "k", "v", "media_rows", "phi"]
        assert not function.attribute
        declared = {attribute.name: attribute.s for attribute in function.attribute_proto}
        assert declared == {"plugin_namespace": b"flamingo", "plugin_version": b"1"}
        calls = [node for node in model.graph.node if node.domain == "flamingo"]
        assert len(calls) == 2
        for node in calls:
            assert node.op_type == "PhiCrossAttention"
            assert len(node.input) == 5
            assert all(node.input)
            assert {attribute.name: attribute.s for attribute in node.attribute} == declared

    def test_the_cache_goes_from_input_to_output_through_tensor_scatter(self, model: onnx.ModelProto) -> None:
        scatters = {node.output[0]: node for node in model.graph.node if node.op_type == "TensorScatter"}
        expected = [f"present_{kind}.{layer}" for layer in range(3) for kind in "kv"]
        assert sorted(scatters) == sorted(expected)
        for name, node in scatters.items():
            assert node.input[0] == name.replace("present", "past")
            assert node.input[2] == "write_index"
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert attributes == {"axis": 2, "mode": b"linear"}

    def test_attention_is_explicit(self, model: onnx.ModelProto) -> None:
        """No is_causal, no lengths, no cache inside: parsers of such graphs drop or misread them silently."""
        attentions = [node for node in every_node(model) if node.op_type == "Attention"]
        assert len(attentions) == 3 + 1
        for node in attentions:
            assert len(node.input) == 4
            assert len(node.output) == 1
            assert {attribute.name for attribute in node.attribute} == {"scale"}

    def test_no_attribute_is_forwarded_and_no_input_left_out(self, model: onnx.ModelProto) -> None:
        for node in every_node(model):
            assert all(node.input), node.name
            assert not any(attribute.ref_attr_name for attribute in node.attribute), node.name

    def test_the_embedding_is_stored_once(self, model: onnx.ModelProto) -> None:
        large = [tensor.name for tensor in model.graph.initializer if 70 in tensor.dims]
        assert large == ["decoder/embedding"]


def test_saving_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SIZES["nano"]
    model = build_graph(config, "media_kv", planned(config))
    path = tmp_path / "media_kv.onnx"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_graph(model, path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("media_kv.onnx", b"old")]
    monkeypatch.undo()
    save_graph(model, path)
    assert isinstance(ir.load(path), ir.Model)
