"""The lint: good graphs pass with what they must parse to; each silent failure, put in on purpose, is an error that names its place."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from flamingo_export.errors import BuildError
from flamingo_export.specs import SUBGRAPHS

from .conftest import PLUGIN


def node(model, name):
    return next(each for each in model.graph if each.name == name)


def test_what_good_graphs_must_parse_to(lowered, lint):
    for compute in ("fp32", "fp16", "bf16"):
        for name in SUBGRAPHS:
            lint(lowered(name, compute), name, compute)
    body, plugin = lint(lowered("decoder")), lint(lowered("decoder", native=PLUGIN), native=PLUGIN)
    assert (body.plugin_layers, body.cache_updates, body.attentions) == (0, 6, 5)
    assert (plugin.plugin_layers, plugin.cache_updates, plugin.attentions) == (2, 6, 3)
    assert "decoder/embedding" in body.weights
    vision = lint(lowered("vision_encoder"), "vision_encoder")
    assert vision.kernels["vision_encoder/stem/0"] == ("vision_encoder/stem/0/weight", None)
    exact = lint(lowered("vision_encoder", "fp32"), "vision_encoder", "fp32")
    assert exact.kernels["vision_encoder/stem/0"] == ("vision_encoder/stem/0/weight", "vision_encoder/stem/0/bias")


def unused_input(model):
    gate = node(model, "decoder/layer.0/self_attention/content_query")
    gate.replace_input_with(0, gate.inputs[0])
    for use in list(model.graph.inputs[1].uses()):  # positions
        use.node.replace_input_with(use.idx, model.graph.inputs[2])


def nonpad(model):
    attention = node(model, "decoder/layer.0/self_attention/attention")
    lengths = next(value for value in model.graph.inputs if value.name == "write_index")
    attention.resize_inputs(7)
    attention.replace_input_with(6, lengths)


def causal(model):
    node(model, "decoder/layer.0/self_attention/attention").attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def softcap(model):
    node(model, "decoder/layer.0/self_attention/attention").attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def function_of(model):
    return next(iter(model.functions.values()))


def add_function(model, domain, name):
    source = function_of(model)
    x = ir.Value(name="x")
    relu = ir.node("Relu", [x], outputs=[ir.Value(name="y")], name="relu")
    graph = ir.Graph([x], relu.outputs, nodes=[relu], opset_imports={"": 24}, name=name)
    extra = ir.Function(domain, name, "", graph=graph, attributes=[])
    model.functions[extra.identifier()] = extra
    return source


def same_name_twice(model):
    add_function(model, "other", "PhiCrossAttention")


def built_in_name(model):
    add_function(model, "flamingo", "Gelu")


def forwarded_attribute(model):
    attention = next(each for each in function_of(model) if each.op_type == "Attention")
    attention.attributes["scale"] = ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT)


def undeclared_value(model):
    function_of(model).attributes["scale"] = ir.Attr("scale", ir.AttributeType.FLOAT, None)


def inside_of_a_function(model, **attributes):
    """A call of another function in the body of the first: its declared attributes must be passed there too."""
    body = function_of(model)
    relu = ir.node("Relu", [ir.Value(name="x")], outputs=[ir.Value(name="y")], name="relu")
    assert relu.inputs[0] is not None
    graph = ir.Graph([relu.inputs[0]], relu.outputs, nodes=[relu], opset_imports={"": 24}, name="Inner")
    inner = ir.Function("flamingo", "Inner", "", graph=graph, attributes=[ir.Attr("slope", ir.AttributeType.FLOAT, None)])
    model.functions[inner.identifier()] = inner
    call = ir.node("Inner", [body.outputs[0]], domain="flamingo", attributes=attributes, name="inner/call")
    body.append(call)
    body.outputs[0] = call.outputs[0]


def unknown_operator_in_a_function(model):
    next(each for each in function_of(model) if each.op_type == "Where").domain = "com.example"


def plugin_that_is_not_there(model):
    call = next(each for each in model.graph if each.op_type == "PhiCrossAttention")
    call.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", "flamingo")


def input_left_out(model):
    call = next(each for each in model.graph if each.op_type == "PhiCrossAttention")
    call.replace_input_with(4, None)


def unknown_operator(model):
    node(model, "decoder/layer.0/gelu").domain = "com.example"


def cache_beside_its_update(model):
    scatter = node(model, "decoder/layer.1/self_attention/write_k")
    attention = node(model, "decoder/layer.1/self_attention/attention")
    attention.replace_input_with(1, scatter.inputs[0])


def scatter_along_another_axis(model):
    node(model, "decoder/layer.1/self_attention/write_k").attributes["axis"] = ir.AttrInt64("axis", 1)


def dynamic_capacity(model):
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in ("past_k.0", "present_k.0"):
            value.shape = ir.Shape(["B", 4, "C", 10])


def cache_through_a_cast(model):
    scatter = node(model, "decoder/layer.1/self_attention/write_k")
    identity = ir.node("Identity", [scatter.inputs[0]], name="between")
    model.graph.insert_before(scatter, identity)
    scatter.replace_input_with(0, identity.outputs[0])


def another_type(model):
    model.graph.outputs[0].dtype = ir.DataType.FLOAT


def another_place(model, name, **changes):
    value = model.graph.initializers[name]
    old = value.const_value
    place = {"location": old.location, "offset": old.offset, "length": old.length} | changes
    value.const_value = ir.ExternalTensor(
        place["location"], place["offset"], place["length"], old.dtype, shape=old.shape, name=name, base_dir=old.base_dir
    )


def shared_bytes(model):
    other = model.graph.initializers["decoder/layer.1/ffw_up"].const_value
    another_place(model, "decoder/layer.0/ffw_up", location=other.location, offset=other.offset)


def wrong_length(model):
    another_place(model, "decoder/layer.0/ffw_up", length=6)


def outside(model):
    another_place(model, "decoder/layer.0/ffw_up", location="../x.safetensors")


@pytest.mark.parametrize(
    ("trap", "said"),
    [
        (unused_input, "input positions is not used"),
        (nonpad, "decoder/layer.0/self_attention/attention has nonpad_kv_seqlen"),
        (causal, "decoder/layer.0/self_attention/attention sets is_causal"),
        (softcap, "sets softcap"),
        (same_name_twice, "2 functions are called PhiCrossAttention"),
        (built_in_name, "function Gelu has the name of a built-in operator"),
        (forwarded_attribute, "forwards scale"),
        (undeclared_value, "does not pass scale"),
        (plugin_that_is_not_there, "names a plugin"),
        (input_left_out, "leaves inputs of PhiCrossAttention out"),
        (inside_of_a_function, "inner/call does not pass slope"),
        (unknown_operator_in_a_function, "com.example::Where, which has neither body nor plugin"),
        (unknown_operator, "decoder/layer.0/gelu is a com.example::Gelu"),
        (cache_beside_its_update, "past_k.1 is read by decoder/layer.1/self_attention/attention"),
        (scatter_along_another_axis, "does not write linearly along axis 2"),
        (dynamic_capacity, "past_k.0 has shape"),
        (cache_through_a_cast, "expected the input past_k.1"),
        (another_type, "output logits is FLOAT, expected FLOAT16"),
        (shared_bytes, "weights decoder/layer.0/ffw_up and decoder/layer.1/ffw_up share bytes of a file"),
        (wrong_length, "decoder/layer.0/ffw_up has 6 bytes in its file, expected 3584"),
        (outside, "decoder/layer.0/ffw_up lies outside of the bundle"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_trap_is_an_error(lowered, lint, trap, said):
    model = lowered("decoder")
    trap(model)
    with pytest.raises(BuildError, match=said):
        lint(model)


def test_a_body_beside_its_plugin_is_an_error(lowered, lint):
    with pytest.raises(BuildError, match="still has a body beside its plugin"):
        lint(lowered("decoder"), native=PLUGIN)
    model = lowered("decoder", native=PLUGIN)
    with pytest.raises(BuildError, match="neither body nor plugin"):
        lint(model)
    next(each for each in model.graph if each.op_type == "PhiCrossAttention").attributes.pop("plugin_version")
    with pytest.raises(BuildError, match="does not name its plugin: plugin_version"):
        lint(model, native=PLUGIN)


def test_fp32_attention_must_be_decomposable(lowered, lint):
    model = lowered("decoder", "fp32")
    del node(model, "decoder/layer.0/self_attention/attention").attributes["TRT_decomposable"]
    with pytest.raises(BuildError, match="without TRT_decomposable"):
        lint(model, compute="fp32")


def test_every_fault_is_named_at_once(lowered, lint):
    model = lowered("decoder")
    causal(model)
    outside(model)
    with pytest.raises(BuildError, match=r"is_causal.*outside of the bundle"):
        lint(model)
