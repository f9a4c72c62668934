"""What the parser takes without a word is refused after parsing, and what it refuses is named with its place in our graph."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from flamingo_export.backends.tensorrt import engine_builder as builder_module
from flamingo_export.backends.tensorrt.engine_builder import Task, build, check
from flamingo_export.backends.tensorrt.log import BuilderMessages, listening
from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.backends.tensorrt.lowering.shapes import profiles
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.errors import BuildError
from flamingo_export.specs import TensorSpec, subgraph_specs

TARGET = "sm89"

pytestmark = pytest.mark.tensorrt
LIMITS = ShapeLimits(max_length=64, chunk=16, bank_rows=8, batch=2)
PLUGIN = frozenset({"PhiCrossAttention"})


@pytest.fixture
def task(nano_bundles, tmp_path):
    """A task of nano's graphs; `change` breaks the graph after the lint has passed it, so that only the network tells."""

    numbers = itertools.count()

    def make(name="decoder", change=lambda model: None, native=frozenset(), storage="fp16"):
        bundle = nano_bundles[storage]
        spec = subgraph_specs(read_manifest(bundle).config)[name]
        model = lower(ir.load(bundle / f"{name}.onnx"), compute=storage, capacity=64, native_functions=native)
        expected = check_graph(model, spec, compute=storage, capacity=64, native_functions=native)
        change(model)
        graph = bundle / f"{name}.{tmp_path.name}.{next(numbers)}.onnx"
        save_lowered(model, graph)
        return Task(
            graph=graph, spec=spec, expected=expected, profiles=profiles(spec, LIMITS), capacity=64,
            engine=tmp_path / "x.engine", target=TARGET, fp32=storage == "fp32",
        )  # fmt: skip

    return make


def node(model, name):
    return next(each for each in model.graph if each.name == name)


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_good_graphs_pass(rtx, task, storage):
    for name in ("decoder", "vision_encoder", "resampler", "media_kv"):
        check(rtx, task(name, storage=storage))


@pytest.mark.slow
def test_an_input_that_the_parser_drops_is_an_error(rtx, task):
    """Attention's nonpad_kv_seqlen: parsed, counted among the inputs, and read by nothing."""

    def nonpad(model):
        attention = node(model, "resampler/layer.0/attention")
        lengths = ir.Value(name="lengths", shape=ir.Shape(["N"]), type=ir.TensorType(ir.DataType.INT64))
        model.graph.inputs.append(lengths)
        attention.resize_inputs(7)
        attention.replace_input_with(6, lengths)

    dropped = task("resampler", change=nonpad)
    lengths = TensorSpec("lengths", "int64", ("N",))
    spec = msgspec.structs.replace(dropped.spec, inputs=(*dropped.spec.inputs, lengths))
    with pytest.raises(BuildError, match=r"read resampler otherwise than it is.*[Uu]nused [Ii]nput: lengths"):
        build(rtx, msgspec.structs.replace(dropped, spec=spec))
    assert not dropped.engine.exists()


def test_a_plugin_that_is_not_loaded_is_an_error_that_names_the_node(rtx, task):
    with pytest.raises(
        BuildError, match=r"decoder/layer.0/cross_attention/phi_attention \(PhiCrossAttention\).*plugin library"
    ):
        check(rtx, task(native=PLUGIN))


def test_the_body_in_the_place_of_a_plugin_is_an_error(rtx, task):
    """The node names a plugin, the plugin is not loaded, and the function's body is there: TensorRT takes the body and says nothing."""
    body = task()
    plugin = task(native=PLUGIN)
    silent = msgspec.structs.replace(body, expected=plugin.expected)
    with pytest.raises(BuildError, match="0 plugin layers, expected 3"):
        check(rtx, silent)


def test_a_cache_that_is_not_updated_in_place_is_an_error(rtx, task):
    def copied(model):
        """The cache is written to a copy: the update becomes a scatter, and the output is not the input's buffer."""
        scatter = node(model, "decoder/layer.1/self_attention/write_k")
        rows = ir.node("Concat", [scatter.inputs[0], scatter.inputs[1]], attributes={"axis": 2}, name="joined")
        steps = [ir.Value(name=f"bound.{index}") for index in range(3)]
        for value, number in zip(steps, (0, 64, 2), strict=True):
            value.const_value = ir.tensor(np.array([number]), name=value.name)
            value.shape, value.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
            model.graph.register_initializer(value)
        cut = ir.node("Slice", [rows.outputs[0], *steps], name="cut")
        model.graph.insert_before(scatter, [rows, cut])
        result, old = cut.outputs[0], scatter.outputs[0]
        rows.outputs[0].name = "joined:0"
        result.name, result.shape, result.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        model.graph.remove(scatter, safe=True)

    with pytest.raises(BuildError, match="11 cache updates in place, expected 12"):
        check(rtx, task(change=copied))


def test_weights_that_changed_or_are_gone_are_an_error(rtx, task):
    def swapped(model):
        one, other = (model.graph.initializers[f"decoder/layer.{layer}/ffw_up"] for layer in (0, 1))
        one.const_value, other.const_value = other.const_value, one.const_value
        one.const_value.name, other.const_value.name = one.name, other.name

    good, changed = task(), task(change=swapped)
    with pytest.raises(BuildError, match=r"weight decoder/layer\.0/ffw_up has other numbers"):
        check(rtx, msgspec.structs.replace(changed, expected=good.expected))

    extra = dict(good.expected.weights) | {"decoder/layer.9/ffw_up": good.expected.weights["decoder/layer.1/ffw_up"]}
    with pytest.raises(BuildError, match=r"decoder/layer\.9/ffw_up was lost, is not read, or was merged"):
        check(rtx, msgspec.structs.replace(good, expected=msgspec.structs.replace(good.expected, weights=extra)))


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_biases_of_convolutions_that_changed_or_are_gone_are_an_error(rtx, task, storage):
    """In fp32 the bias is in the layer, in 16 bits it is a constant of its own, in fp32 behind a Cast."""
    found = {}

    def swapped(model):
        biases = [node.inputs[2] for node in model.graph if node.op_type == "Conv" and storage == "fp32"] or [
            node.inputs[2].producer().inputs[0] for node in model.graph if node.op_type == "Conv"
        ]
        one, other = next(
            (one, other) for index, one in enumerate(biases) for other in biases[:index] if one.shape == other.shape
        )
        one.const_value, other.const_value = other.const_value, one.const_value
        one.const_value.name, other.const_value.name = one.name, other.name
        found["name"] = one.name

    def dropped(model):
        convolution = next(node for node in model.graph if node.op_type == "Conv")
        found["name"] = f"{convolution.name}/bias"
        convolution.resize_inputs(2)

    with pytest.raises(BuildError, match=r"weight .*/bias has other numbers") as caught:
        check(rtx, task("vision_encoder", swapped, storage=storage))
    assert found["name"] in str(caught.value)
    with pytest.raises(BuildError, match=r"weight .*/bias was lost") as caught:
        check(rtx, task("vision_encoder", dropped, storage=storage))
    assert found["name"] in str(caught.value)


def test_an_unknown_operator_is_named_with_its_place(rtx, task):
    def unknown(model):
        node(model, "decoder/layer.2/gelu").op_type = "Frobnicate"

    with pytest.raises(BuildError, match=r"node decoder/layer.2/gelu \(Frobnicate\)"):
        check(rtx, task(change=unknown))


def test_a_corrupt_graph_file(rtx, task):
    broken = task()
    broken.graph.write_bytes(b"not a graph")
    with pytest.raises(BuildError, match="does not take"):
        check(rtx, broken)


def test_engines_may_not_allocate_while_they_run(rtx, task):
    """Without the flag TensorRT for RTX may, and then a step cannot be captured as a CUDA graph."""
    with listening(rtx, BuilderMessages()) as logger:
        config = builder_module._config(rtx, rtx.Builder(logger), task("decoder"))
        assert config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)


class Interrupting:
    """A Progress at whose first sign of life the user presses Ctrl-C."""

    def stage(self, name, total, unit="items"):
        pass

    def advance(self, amount):
        raise KeyboardInterrupt

    def note(self, text):
        pass


def test_ctrl_c_stops_the_build_and_leaves_nothing(rtx, task):
    stopped = task("resampler")
    with pytest.raises(KeyboardInterrupt):
        build(rtx, stopped, progress=Interrupting())  # type: ignore[arg-type]
    assert list(stopped.engine.parent.iterdir()) == []


def test_memory_of_the_host_that_runs_out_is_told_with_what_was_wanted(rtx, task, monkeypatch):
    def short(*_):
        raise MemoryError

    monkeypatch.setattr(builder_module, "parse", short)
    small = task("media_kv")
    with pytest.raises(
        BuildError, match=r"media_kv: memory of the host ran out while its engine was built, which takes about 1\.\d GiB"
    ):
        build(rtx, small)
    assert list(small.engine.parent.iterdir()) == []


def test_a_builder_that_fails_says_what_the_weights_take(rtx, task, monkeypatch):
    """As when memory of the GPU runs out: TensorRT for RTX builds on the host, so its failure is put in its place."""

    class Failing(rtx.Builder):  # type: ignore[misc, name-defined]
        def build_serialized_network_to_stream(self, network, config, writer):
            self.logger.log(rtx.ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 123 bytes.)")
            return False

    monkeypatch.setattr(rtx, "Builder", Failing)
    with pytest.raises(
        BuildError, match=r"did not build media_kv, whose weights take 0\.\d\d GiB\. memory ran out .*Requested size was 123"
    ):
        build(rtx, task("media_kv"))


def test_a_disk_that_fails_is_told_as_such(rtx, task, tmp_path):
    full = msgspec.structs.replace(task("media_kv"), engine=tmp_path / "missing" / "x.engine")
    (tmp_path / "missing").write_text("a file where a folder is wanted")
    with pytest.raises(OSError, match="missing"):
        build(rtx, full)
