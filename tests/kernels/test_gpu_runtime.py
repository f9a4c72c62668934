"""The runtime stages of scripts/gpu_check on a card in host memory, with the kernels in the emulator: what they check, and that they notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from fake_card import FakeCard
from gpu import kernel_build, kernel_oracle, nano, onnxruntime_cuda, sessions
from gpu.kernel_library import Args, Kernels
from gpu.torch_backend import kernel_attend
from gpu.torch_graph import TorchGraph, UnknownOperator

import flamingo_export
from flamingo_export.backends.tensorrt.device_memory import Memory
from flamingo_export.backends.tensorrt.engine_contract import contract_of
from flamingo_export.backends.tensorrt.feeds import Feeds
from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates
from flamingo_export.backends.tensorrt.lowering.lower import lower
from flamingo_export.backends.tensorrt.session import MAX_GRAPHS, TensorRTSession
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.sources.choice import source_for_size


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Kernels:
    """The kernels of head size 32, block by block on the CPU."""
    if kernel_build.find_compiler() is None:
        pytest.skip("no C++ compiler (g++)")
    return Kernels(kernel_build.build_emulated_library(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(scope="module")
def nano16(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, storage="fp16", limits=nano.LIMITS, parity="skip")
    return path


@pytest.mark.parametrize("name", ["vision_encoder", "resampler", "media_kv", "image_tower", "text_tower", "decoder"])
def test_graphs_in_torch_are_those_of_onnxruntime(name, nano16, tmp_path):
    """In fp16, with the functions' own bodies. The cache that is fed is the one that is updated."""
    manifest, rng = read_manifest(nano16), np.random.default_rng(0)
    graph = manifest.graph(name)
    contract = contract_of(manifest, graph)
    model = lower(ir.load(nano16 / graph.file), compute="fp16", capacity=contract.capacity, native_functions=frozenset())
    add_candidates(model, contract.spec, banned=manifest.config.tokens.never)
    path = nano16 / f"{name}.lowered.onnx"
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options)
    path.unlink()
    sizes = {"B": 2, "S": 5, "K": 2, "M": 3, "N": 4, "F": 2, "T": 1}
    most = {
        "token_ids": 60,
        "positions": 9,
        "media_rows": 4,
        "phi": 4,
        "write_index": 3,
        "key_positions": 9,
        "logit_positions": 5,
        "lengths": 5,
    }
    feeds = {}
    for tensor in contract.spec.inputs:
        shape = contract.shape(tensor, sizes)
        if tensor.kind == "bool":
            feeds[tensor.name] = np.zeros(shape, bool)
            feeds[tensor.name][..., :8] = True
        elif tensor.kind == "int64":
            feeds[tensor.name] = rng.integers(0, most[tensor.name], shape) + (tensor.name == "lengths")  # no text is empty
        else:
            feeds[tensor.name] = (0.3 * rng.standard_normal(shape)).astype(np.float32 if tensor.kind == "fp32" else np.float16)
    right = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
    given = {key: torch.from_numpy(value.copy()) for key, value in feeds.items()}
    found = TorchGraph(model, torch.device("cpu"))(given)
    for output, value in right.items():
        mine = found[output].float().numpy()
        seen = np.isfinite(value)
        assert mine.shape == value.shape
        np.testing.assert_allclose(mine[seen], value[seen], atol=4e-3 * np.abs(value[seen]).max(), err_msg=output)
    for output, source in contract.spec.aliases.items():
        assert found[output].data_ptr() == given[source].data_ptr()


def test_an_operator_that_is_not_known_is_named():
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([1]))
    node = ir.node("Erf", [x], name="layer.0/erf")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24})
    with pytest.raises(UnknownOperator, match=r"Erf, node layer\.0/erf"):
        TorchGraph(ir.Model(graph, ir_version=10), torch.device("cpu"))({"x": torch.zeros(1)})


@pytest.mark.slow
def test_sessions_on_the_kernel_pass(emulated):
    card = FakeCard()
    found = sessions.run(card, emulated.launch, head_size=32, seed=3, copied=1 << 12)
    assert set(found) == {*sessions.CHECKS, "overlap"}
    assert [part["failures"] for part in found.values() if part.get("failures")] == []
    assert min(part["cases"] for part in found.values() if "cases" in part) >= 3
    assert card.cuda.calls["launch"] > 20
    assert card.cuda.calls["end_capture"] > MAX_GRAPHS


def by_oracle(args: Args, stream: int, *, wrong: bool = False) -> None:
    """A launch that the definition computes, in host memory; wrong: one medium further than it should look."""
    import ctypes

    def array(address: int, dtype: Any, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    batch, positions, heads, size = args.batch, args.positions, args.heads, args.head_size
    q = array(args.q, np.float16, batch, positions, heads, size)
    bank = [array(each, np.float16, args.bank_rows, heads, args.latents, size) for each in (args.k, args.v)]
    rows, phi = array(args.media_rows, np.int64, batch, args.media), array(args.phi, np.int64, batch, positions)
    given = [torch.from_numpy(x.copy()) for x in (q, *bank, (rows + wrong) % args.bank_rows, phi)]
    y = kernel_oracle.attend(*given, dtype=torch.float32).half()
    array(args.y, np.float16, *q.shape)[...] = y.numpy()


def rig(**changes: bool) -> sessions.Rig:
    return sessions.Rig(FakeCard(), lambda args, stream: by_oracle(args, stream, **changes), head_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in sessions.CHECKS if name != "many graphs"])
def test_each_check_of_the_sessions(name):
    assert sessions.CHECKS[name](rig()) >= 3


def test_the_checks_notice_a_wrong_medium():
    with pytest.raises(AssertionError, match="error"):
        sessions.shapes(rig(wrong=True))


def test_the_checks_notice_a_graph_that_replays_old_feeds(monkeypatch):
    """As a runtime would that launches a captured step without sending its feeds."""
    made = rig()
    differing = Feeds.differing
    sent: list[Any] = []

    def once(self, *rest):
        if not sent:
            sent.append(differing(self, *rest))

    monkeypatch.setattr(Feeds, "differing", once)
    with pytest.raises(AssertionError):
        sessions.capture(made)


def test_the_checks_notice_a_graph_of_other_rows(monkeypatch):
    """As a runtime would that told graphs by shapes alone."""
    made = rig()
    monkeypatch.setattr(TensorRTSession, "_binding", lambda self: ())
    sessions.capture(made)
    with pytest.raises(AssertionError, match="rows that it was given"):
        sessions.rows(made)


def test_the_collector_within_an_engine_changes_no_result():
    """What it frees waits for the device, and must not have the rest of the step done before the engine is finished."""
    held: list[Memory] = []

    def launch(args: Args, stream: int) -> None:
        held.clear()
        by_oracle(args, stream)

    made = sessions.Rig(FakeCard(), launch, head_size=32)
    for _ in range(4):
        held.append(Memory(made.streams[0], 64))
        made.step(2, 3)
    assert made.card.cuda.calls["free"] >= 4  # type: ignore[attr-defined]


@pytest.mark.slow
def test_nano_on_a_card_passes(emulated, tmp_path):
    """Parity, every way to generate, and scores in each type: the stage's own code from end to end."""
    launches = []

    def launch(args: Args, stream: int) -> None:
        launches.append(emulated.name(args))
        emulated.launch(args, stream)

    found = nano.run(FakeCard(), kernel_attend(launch, lambda: 0), nano.build_bundles(tmp_path), count=2)
    assert [part["failures"] for part in found.values() if part["failures"]] == []
    assert {"fp32", "prefill", "decode"} <= set(launches)
    assert found["generation in fp32, the kernel"]["steps_captured"]
    assert found["scores in fp16"]["answers"]["right"] == 2
    assert len(found) == 5


def test_comparison_of_generations_names_what_differs():
    right = {"a": ([(1, 2)], [(-0.5, -0.25)]), "b": ([(3,)], [(-1.0,)])}
    assert nano.compare_generations(right, right) == []
    (fault,) = nano.compare_generations({**right, "a": ([(1, 3)], [(-0.5, -0.25)])}, right)
    assert fault.startswith("a: tokens")
    (fault,) = nano.compare_generations({**right, "b": ([(3,)], [(-1.01,)])}, right)
    assert fault == "b: a log-probability is off by 0.01"


def test_what_onnxruntime_may_not_do_is_a_failure():
    found = {"model": "nano", "type": "fp16", "onnxruntime": "1.24.4", "operators_on_the_cpu": {"Shape": 3}}
    row = {"length": 64, "batch": 1, "difference": {"logits": 1e-3, "caches": 1e-3}}
    assert onnxruntime_cuda.failures({**found, "rows": [row]}) == []
    (fault,) = onnxruntime_cuda.failures({**found, "rows": [row], "operators_on_the_cpu": {"Attention": 6, "Shape": 1}})
    assert fault == "Attention run on the CPU: ONNX Runtime 1.24.4 has no CUDA kernel for them as they are"
    (fault,) = onnxruntime_cuda.failures({**found, "rows": [{**row, "difference": {"logits": float("nan"), "caches": 0.0}}]})
    assert "logits differ" in fault


def test_a_step_of_onnxruntime_is_torchs_and_updates_the_cache_in_place(nano16):
    """What the stage runs, on the CPU provider: past and present are one value of the device."""
    (row,) = onnxruntime_cuda.measure(nano16, "CPUExecutionProvider", [48], [2], steps=1)["rows"]
    assert set(row["difference"]) == {"logits", "caches"}
    assert max(row["difference"].values()) < 2e-3  # 16 bits through six layers; a cache that was not written is off by 1
    assert row["onnxruntime_steps_per_second"] > 0
