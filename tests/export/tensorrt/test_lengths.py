"""Slots in use, told to self-attentions: set on every attention over a cache, counted, and right for whatever the runtime asks."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fake_cuda import FakeCuda

import flamingo_export
from flamingo_export.backends.tensorrt import engine_builder, lengths, library, parsing, slots
from flamingo_export.backends.tensorrt.engine_builder import Task
from flamingo_export.backends.tensorrt.engine_contract import contract_of
from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates
from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.errors import BackendError, BuildError, InputError
from flamingo_export.runtime.request import Request


def task_of(bundle, tmp_path, name: str = "decoder") -> Task:
    manifest = read_manifest(bundle)
    graph = manifest.graph(name)
    contract, compute = contract_of(manifest, graph), manifest.precision.storage
    model = lower(ir.load(bundle / graph.file), compute=compute, capacity=contract.capacity, native_functions=frozenset())
    add_candidates(model, contract.spec, banned=manifest.config.tokens.never)
    expected = check_graph(model, contract.spec, compute=compute, capacity=contract.capacity)
    path = bundle / f"{name}.lengths.onnx"
    save_lowered(model, path)
    return Task(
        graph=path, spec=contract.spec, expected=expected, profiles=contract.profiles[-1:], capacity=contract.capacity,
        engine=tmp_path / f"{name}.engine", target="sm89", fp32=compute == "fp32",
    )  # fmt: skip


def test_every_attention_over_a_cache_has_lengths_and_no_other(rtx, nano_bundles, tmp_path, monkeypatch):
    """Six self-attentions have; the attentions over media, whose keys are gathered from the bank, have none."""
    task = task_of(nano_bundles["fp16"], tmp_path)
    assert (task.expected.attentions_over_caches, task.expected.attentions) == (6, 9)
    engine_builder.check(rtx, task)
    monkeypatch.setattr(engine_builder, "set_lengths", lambda *_: 0)
    with pytest.raises(BuildError, match="0 attentions with the lengths in use, expected 6"):
        engine_builder.check(rtx, task)


def test_subgraphs_without_caches_have_none(rtx, nano_bundles, tmp_path):
    task = task_of(nano_bundles["fp16"], tmp_path, "resampler")
    assert task.expected.attentions_over_caches == 0
    engine_builder.check(rtx, task)


def test_a_version_without_lengths_reads_the_capacity(rtx, nano_bundles, tmp_path, monkeypatch):
    """TensorRT 10.x: nothing is set, and nothing is missed."""
    monkeypatch.setattr(lengths, "ATTRIBUTE", "no_such_attribute")
    assert not lengths.supported(rtx)
    engine_builder.check(rtx, task_of(nano_bundles["fp16"], tmp_path))


@pytest.mark.slow
def test_an_engine_with_lengths_is_fused_and_as_large_as_without(rtx, nano_bundles, tmp_path, monkeypatch):
    task = task_of(nano_bundles["fp16"], tmp_path)
    told = engine_builder.build(rtx, task)
    assert told.summary.attentions_with_lengths == 6
    monkeypatch.setattr(engine_builder, "set_lengths", lambda *_: 0)
    monkeypatch.setattr(parsing, "count_lengths", lambda trt, network: 6)
    untold = engine_builder.build(rtx, task)
    assert told.summary.fused_attentions == untold.summary.fused_attentions == 9
    assert told.size == pytest.approx(untold.size, rel=0.01)


# What the runtime asks for is within the slots in use.


class Seen:
    """Feeds of every decoder call, checked as an engine with lengths needs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.branches = self.holes = False
        check = slots.check_mask

        def checked(name: str, feeds: Mapping[str, Any]) -> None:
            self.calls += 1
            mask, index = feeds["mask"][:, 0], feeds["write_index"]
            width = mask.shape[1]
            if 1 < width <= 4:
                self.branches |= bool((mask[:, 0] != mask[:, 1]).any())
                self.holes |= bool((~mask.any(axis=1)[0, : int(index[0])]).any())
            own = index[:, None] + np.arange(width)
            assert np.take_along_axis(mask, own[:, :, None], axis=2).all(), "a position does not see its own slot"
            check(name, feeds)

        from flamingo_export.backends.tensorrt import session

        monkeypatch.setattr(session, "check_mask", checked)


def test_slots_in_use_are_dense_with_holes_retired_rows_and_padded_prefill(
    gpu, tiny_bundle, tiny_config, tmp_path, monkeypatch
):
    """Lengths are write_index + S. Branches leave holes that their siblings fill, rows that are done stay in a batch, and short prompts are
    padded beside long ones: no position may ever see a slot from its row's length on, or the engine would give another result. By the
    runtime's own calls, and by those of parity's cases, which pad and keep rows."""
    from fake_gpu import LIMITS, add_engines

    from flamingo_export.validate.expected.cases import decoder_cases
    from flamingo_export.validate.expected.decoder_calls import plan_case

    seen = Seen(monkeypatch)
    rng = np.random.default_rng(0)

    def request(length: int) -> Request:
        return Request(prompt=[1, *rng.integers(4, 70, length).tolist()])

    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle", **LIMITS)
    with flamingo_export.load(bundle, backend="tensorrt-rtx", threads=1) as model:
        for beams in (1, 4):
            model.generate([request(3), request(41), request(20)], beams=beams, max_new_tokens=9, batch_size=3)
            model.generate([request(35), request(2)], beams=beams, max_new_tokens=5, batch_size=2)
        model.generate(request(10), temperature=1.0, seed=1, num_return=3, max_new_tokens=6)
        model.score(request(10), [[5, 6, 7], [8]])
    assert seen.calls > 30
    assert (seen.branches, seen.holes) == (True, True)
    padded = retired = False
    for case in decoder_cases(tiny_config):
        for call in plan_case(tiny_config, case).calls:
            slots.check_mask(case.name, call.feeds)
            pads = call.origin[:, :, 0] < 0
            padded |= bool((pads.any(axis=1) & ~pads.all(axis=1)).any())
            retired |= bool(pads.all(axis=1).any())
    assert (padded, retired) == (True, True)


def feeds(index: list[int], positions: int, capacity: int = 8) -> dict[str, np.ndarray]:
    mask = np.zeros((len(index), 1, positions, capacity), bool)
    return {"write_index": np.array(index), "positions": np.zeros((len(index), positions), np.int64), "mask": mask}


def test_writes_past_the_capacity_are_refused():
    slots.check_writes("decoder", feeds([0, 5], 3), 8)
    with pytest.raises(InputError, match="row 1 would write 3 slots from 6 on, its cache has 8"):
        slots.check_writes("decoder", feeds([0, 6], 3), 8)
    with pytest.raises(InputError, match="row 0 would write 1 slots from -1 on"):
        slots.check_writes("decoder", feeds([-1], 1), 8)


def test_a_mask_behind_the_slots_in_use_is_refused():
    given = feeds([2, 4], 2)
    given["mask"][..., :4] = True
    slots.check_mask("decoder", given)
    given["mask"][0, 0, 0, 4] = True
    with pytest.raises(InputError, match="row 0 may see slots behind the 4 that are in use"):
        slots.check_mask("decoder", given)


def test_a_session_refuses_a_write_past_its_capacity_before_it_asks_the_engine(gpu, tiny_bundle, tmp_path):
    from fake_gpu import LIMITS, add_engines

    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle", **LIMITS)
    with flamingo_export.load(bundle, backend="tensorrt-rtx", threads=1) as model:
        decoder, capacity = model.engines.decoder, model.manifest.limits.max_length
        model.generate(Request(prompt=[1, 5, 6]), beams=1, max_new_tokens=2)
        enqueued = gpu.trt.enqueued
        given = {
            "token_ids": np.ones((1, 2), np.int64), "positions": np.zeros((1, 2), np.int64), "media_rows": np.zeros((1, 1), np.int64),
            "phi": np.zeros((1, 2), np.int64), "write_index": np.array([capacity - 1]), "mask": np.ones((1, 1, 2, capacity), bool),
            "key_positions": np.zeros((1, capacity), np.int64), "logit_positions": np.zeros((1, 1), np.int64),
        }  # fmt: skip
        wanted = {tensor.name for tensor in decoder.spec.inputs}
        with pytest.raises(InputError, match=f"would write 2 slots from {capacity - 1} on, its cache has {capacity}"):
            decoder.run({name: value for name, value in given.items() if name in wanted})
        assert gpu.trt.enqueued == enqueued
    assert isinstance(gpu.cuda, FakeCuda)


@pytest.mark.parametrize(
    ("which", "version", "wanted"),
    [("tensorrt", "10.14.1.48", "10.15"), ("tensorrt", "9.3.0", "10.15"), ("tensorrt-rtx", "1.6.0.5", "1.7"), ("tensorrt", "11.4.0.106", None),
     ("tensorrt", "10.16.1.11", None), ("tensorrt-rtx", "1.10.0", None)],
)  # fmt: skip
def test_versions_that_lack_operators_are_refused_in_words(which, version, wanted, monkeypatch):
    found: Any = ModuleType("tensorrt")
    found.__version__, found.Builder = version, object
    which = library.LIBRARIES[which]
    monkeypatch.setitem(sys.modules, which.modules[0], found)
    if wanted is None:
        assert library.load(which) is found
        return
    with pytest.raises(
        BackendError, match=rf"{re.escape(version)} is too old: its parser has no TensorScatter.*Install {wanted} or later"
    ):
        library.load(which)
