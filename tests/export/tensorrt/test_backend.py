"""What needs no TensorRT: names and refusals, estimates, messages in other words, and phases of a build."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
from fake_gpu import fake_library

from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.registry import availability, get_backend, get_compiler
from flamingo_export.backends.tensorrt import library
from flamingo_export.backends.tensorrt.estimate import check_memory
from flamingo_export.backends.tensorrt.log import BuilderMessages, meaning
from flamingo_export.backends.tensorrt.lowering.lint import Expected
from flamingo_export.backends.tensorrt.lowering.shapes import Bounds, Profile
from flamingo_export.backends.tensorrt.monitor import UNITS, Phases, watched
from flamingo_export.backends.tensorrt.summary import summarise
from flamingo_export.bundle.manifest import GraphRecord
from flamingo_export.errors import BackendError, BuildError
from flamingo_export.estimates import GIB
from flamingo_export.progress import SILENT
from flamingo_reference.config import SIZES

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(library, "device", lambda index=0: None)


def test_neither_runs_engines_without_a_driver(no_gpu, monkeypatch):
    monkeypatch.setattr(library, "installed", lambda which: True)
    for name in ("tensorrt-rtx", "tensorrt"):
        assert not availability()[name].usable
        with pytest.raises(BackendError, match=f"{name} cannot run here: .*no NVIDIA driver"):
            get_backend(name)
        with pytest.raises(BackendError, match=r"engines cannot be opened: .*no NVIDIA driver.*--backend onnxruntime"):
            get_compiler(name).open(Path(), None, GraphRecord(name="decoder", file=""), SessionOptions())  # type: ignore[arg-type]
    assert get_backend("auto").name == "onnxruntime"
    with pytest.raises(BackendError, match="'onnxruntime' compiles no engines"):
        get_compiler("onnxruntime")


def test_what_is_missing_is_said(no_gpu, monkeypatch):
    monkeypatch.setattr(library, "_there", lambda name: False)
    with pytest.raises(BackendError, match=r"TensorRT for RTX is not installed\. pip install tensorrt_rtx_cu13_bindings"):
        get_compiler("tensorrt-rtx", target="sm89").prepare()
    assert availability()["tensorrt"].remedy == library.DATACENTER.install
    monkeypatch.setattr(library, "load", lambda which: fake_library())
    with pytest.raises(BackendError, match=r"on the GPU that runs them.*no NVIDIA driver.*--backend tensorrt-rtx"):
        get_compiler("tensorrt").prepare()


def test_targets(no_gpu, monkeypatch):
    trt = fake_library()
    assert library.resolve_target(library.RTX, trt, "SM89") == "sm89"
    with pytest.raises(BackendError, match=r"no target 'sm90'.*sm120, sm80, sm86, sm89"):
        library.resolve_target(library.RTX, trt, "sm90")
    with pytest.raises(BackendError, match="no GPU here to build for, and no --target"):
        library.resolve_target(library.RTX, trt, None)
    monkeypatch.setattr(library, "device", lambda index=0: library.Device(target="sm80"))
    assert library.resolve_target(library.RTX, trt, None) == "sm80"
    assert library.resolve_target(library.DATACENTER, trt, None) == "sm80"
    with pytest.raises(BackendError, match="GPU of this machine, sm80, not for sm89"):
        library.resolve_target(library.DATACENTER, trt, "sm89")


def test_a_folder_of_the_same_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_rtx").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not library._there("tensorrt_rtx")


NANO = SIZES["nano"]
WEIGHT_BYTES = {"media_kv/layer.0/k_proj": 4 * GIB, **{f"decoder/layer.{layer}/ffw_up": GIB for layer in range(6)}}


def test_memory_that_cannot_suffice_is_refused_before_work():
    decoder, half = (GraphRecord(name="decoder", file="", layers=(0, stop)) for stop in (6, 3))
    needed = check_memory(NANO, decoder, WEIGHT_BYTES, 18 * GIB)
    assert needed.weight_bytes == 6 * GIB
    assert 15 * GIB < needed.memory < 18 * GIB
    assert check_memory(NANO, half, WEIGHT_BYTES, 12 * GIB).weight_bytes == 3 * GIB
    with pytest.raises(
        BuildError,
        match=r"engine of decoder takes about 1\d\.\d GiB .* 10\.0 GiB are available\. In 2 parts it fits: --parts 2\.",
    ):
        check_memory(NANO, decoder, WEIGHT_BYTES, 10 * GIB)
    # Parts that are too large still: three layers, where one fits.
    with pytest.raises(BuildError, match=r"5\.0 GiB are available\. In 6 parts it fits: --parts 6\."):
        check_memory(NANO, half, WEIGHT_BYTES, 5 * GIB)
    with pytest.raises(BuildError, match=r"3\.0 GiB are available\. Even parts of one LM layer would not fit\. Free some"):
        check_memory(NANO, decoder, WEIGHT_BYTES, 3 * GIB)
    with pytest.raises(BuildError, match=r"engine of media_kv .* 8\.0 GiB are available\. Free some"):
        check_memory(NANO, GraphRecord(name="media_kv", file=""), WEIGHT_BYTES, 8 * GIB)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Error Code 10: Internal Error (Could not find any implementation for node X.)", "runs out of memory"),
        ("Error Code 2: OutOfMemory (Requested size was 123 bytes.)", "memory ran out"),
        ("creator && Plugin not found, are the plugin name, version, and namespace correct?", "plugin library is not loaded"),
        ("No importer registered for op: Frobnicate.", "does not have an operator"),
        (
            "The engine plan file is not compatible with this version of TensorRT, expecting 10 got 11",
            "another TensorRT version",
        ),
        ("The engine plan file is generated on an incompatible device", "another GPU"),
        ("CUDA initialization failure with error: 35", "driver is missing or too old"),
    ],
)
def test_messages_in_other_words(text, words):
    assert words in (meaning(text) or "")
    messages = BuilderMessages()
    messages.add(1, text)
    assert words in messages.explanation()
    assert text in messages.explanation()
    assert meaning("something else") is None


def test_nested_phases_fill_one_bar_and_have_their_own():
    phases, total = Phases(), 0
    phases.start("Building", None, 2)
    phases.start("Optimizing", "Building", 4)
    assert phases.units() == 0
    for index, units in ((0, 125), (1, 125), (3, 250)):
        phases.step("Optimizing", index)
        found = phases.units()
        assert found == units
        total += found
    assert phases.under_way() == (("Optimizing", 4, 4),)
    phases.finish("Optimizing")
    assert phases.under_way() == ()
    assert phases.units() == 0  # never backwards
    phases.step("Building", 0)
    phases.start("Timing", "Building", 1)
    phases.step("Timing", 0)
    phases.finish("Building")
    assert total + phases.units() == UNITS


def test_ctrl_c_waits_for_the_work_to_stop():
    cancelled, ended = threading.Event(), threading.Event()

    class Pressed:
        def advance(self, amount):
            raise KeyboardInterrupt

    def work():
        cancelled.wait(10)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        watched(work, Phases(), cancelled, Pressed())  # type: ignore[arg-type]
    assert ended.is_set()
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0, Phases(), threading.Event(), SILENT)


def test_the_summary_reads_what_the_builder_says():
    facts = [
        "Total Activation Memory: 1000 bytes",
        "Total Activation Memory: 200 bytes",
        "Engine Layer Information:\n"
        "Name: _gemm_mha_v2_myl0_9, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half}], Constants: [], "
        "Outputs: [ { Name: y, Datatype: Half}], TacticName: _gemm_mha_v2_0x1, StreamId: 0, Metadata: [ONNX Layer: a]\n"
        "Name: _gemm_mha_v2_myl1_9, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: y, Datatype: Half}], TacticName: x, "
        "StreamId: 0, Metadata: \n"
        "Name: PhiCrossAttention/mask, LayerType: gemm, Inputs: [ { Name: q, Datatype: Half}], Constants: [], "
        "Outputs: [ { Name: y, Datatype: Float}], TacticName: , StreamId: 0, Metadata: ",
    ]
    profiles = tuple(Profile(name=name, bounds={"B": Bounds(1, 2, 3)}) for name in ("prefill", "decode"))
    expected = Expected(plugin_layers=0, cache_updates=2, attentions=1, weights={}, kernels={})
    summary = summarise(facts, expected, Counter({"CAST": 3, "SHUFFLE": 4}), profiles)
    assert (summary.layers, summary.kernels) == (7, {"kgen": 2, "gemm": 1})
    assert (summary.fused_attentions, summary.output_types) == (1, {"Half": 2, "Float": 1})
    assert [profile.activation_bytes for profile in summary.profiles] == [1000, 200]
    assert summary.profiles[0].bounds == {"B": (1, 2, 3)}
