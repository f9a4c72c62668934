"""A decoder in parts on several GPUs of one machine: all fakes, whose devices refuse memory, streams and events of each other."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from engine_steps import decode, request, same, submitted
from fake_cuda import Machine, Misuse
from fake_gpu import LIMITS, FakeGpu, add_engines, install

import flamingo_export
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.placement import ENCODERS, place, residents
from flamingo_export.backends.tensorrt import library
from flamingo_export.backends.tensorrt.backend import TensorRTBackend
from flamingo_export.backends.tensorrt.device_memory import DeviceBuffer, DeviceStream, DeviceTensor
from flamingo_export.backends.tensorrt.dtypes import ELEMENT_TYPES
from flamingo_export.backends.tensorrt.engine_contract import contract_of, resident_bytes
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.errors import BackendError
from flamingo_export.estimates import Resident
from flamingo_export.precision import Precision
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_export.sources import LiveSource

GIB = 1 << 30
Load = Callable[..., tuple[Model, Model, FakeGpu]]


@pytest.fixture
def load(monkeypatch, tiny_model, bundle_writer, tmp_path) -> Iterator[Load]:
    """The tiny model: its parts on so many GPUs, the whole decoder on ONNX Runtime."""
    with ExitStack() as stack:

        def opened(parts: int, gpus: int, *, peers: bool = True, storage: str = "fp32") -> tuple[Model, Model, FakeGpu]:
            fake = install(monkeypatch, tmp_path, *[GIB] * gpus, peers=peers)
            source, precision = LiveSource(tiny_model), Precision(storage=storage)  # type: ignore[arg-type]
            cut = bundle_writer(source, tmp_path / "cut.bundle", parts=parts, precision=precision)
            engines = add_engines(cut, tmp_path / "engines.bundle", **LIMITS)
            whole = bundle_writer(source, tmp_path / "whole.bundle", precision=precision)
            device = ",".join(f"cuda:{index}" for index in range(gpus))
            found = flamingo_export.load(engines, backend="tensorrt-rtx", device=device, threads=1)
            host = flamingo_export.load(whole, backend="onnxruntime", threads=1)
            stack.enter_context(found)
            stack.enter_context(host)
            return found, host, fake

        yield opened


def devices_of(model: Model) -> list[tuple[int, int]]:
    return [part._stream.device for part in model.engines.decoder._parts]  # type: ignore[attr-defined]


# Generation.


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "gpus", "peers"), [(2, 2, True), (2, 2, False), (3, 3, True), (3, 2, False)])
def test_the_same_answers_as_the_whole_on_onnxruntime(load: Load, parts, gpus, peers):
    """Greedy, beams, samples, a batch, a second question about the same images, scores."""
    engines, host, _ = load(parts, gpus, peers=peers)
    assert sorted({index for _, index in devices_of(engines)}) == list(range(gpus))
    for settings in ({"beams": 1}, {"beams": 3, "num_return": 3}, {"temperature": 0.7, "top_k": 4, "seed": 6, "num_return": 3}):
        for seed, length, media in ((0, 9, 1), (1, 40, 5), (2, 3, 0)):
            asked = request(seed, length, media)
            same(engines.generate(asked, max_new_tokens=8, **settings), host.generate(asked, max_new_tokens=8, **settings))
    requests = [request(10 + seed, 5 + 7 * seed, seed % 3) for seed in range(5)]
    both = (model.generate(requests, beams=2, max_new_tokens=6, batch_size=8) for model in (engines, host))
    for one, other in zip(*both, strict=True):
        same(one, other)
    first = request(20, 30, 3)
    second = Request(prompt=[*first.prompt, 20, 21], media=first.media)
    for asked in (first, second, second):
        found, expected = (model.generate(asked, beams=3, max_new_tokens=5) for model in (engines, host))
        same(found, expected)
        assert found.timings.reused_tokens == expected.timings.reused_tokens
    candidates = [[5], [6, 7, 8], list(range(10, 26)), [9, 2]]
    for one, other in zip(engines.score(first, candidates), host.score(first, candidates), strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-4)


def test_in_16_bits_hidden_states_cross_in_the_engines_type(load: Load):
    engines, host, _ = load(2, 2, storage="fp16")
    found, expected = (model.score(request(70, 20, 2), [[5, 6, 7], [30, 2]]) for model in (engines, host))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=2e-2)


@pytest.mark.parametrize("peers", [True, False])
def test_a_step_moves_the_hidden_states_and_nothing_else_between_gpus(load: Load, peers):
    """Each part's step is one captured graph, the host waits once, and copies of hidden states are as large as these."""
    engines, _, fake = load(3, 3, peers=peers)
    width, steps = 3, 4
    loop = submitted(engines, request(80, 30, 2), width)
    decode(loop, 3)  # run, captured, launched
    devices = fake.machine.devices
    crossed, calls = [device.crossed.copy() for device in devices], [device.calls.copy() for device in devices]
    enqueued = fake.trt.enqueued
    decode(loop, steps)
    moved = [device.crossed - before for device, before in zip(devices, crossed, strict=True)]
    called = [device.calls - before for device, before in zip(devices, calls, strict=True)]
    hidden = steps * width * engines.config.language_model.width * 4
    if peers:
        assert [each["from peer"] for each in moved] == [0, hidden, hidden]
        assert moved[0]["to host"] == moved[1]["to host"] == 0
    else:
        assert [each["from peer"] for each in moved] == [0, 0, 0]
        assert [each["to host"] for each in moved[:2]] == [hidden, hidden]
    assert [each["launch"] for each in called] == [steps] * 3
    assert [each["synchronize"] for each in called] == [0, 0, steps]
    assert fake.trt.enqueued == enqueued
    loop.abandon(None)


@pytest.mark.parametrize("peers", [True, False])
def test_without_the_events_between_them_the_next_part_reads_what_was_there_before(load: Load, monkeypatch, peers):
    """What orders the streams is needed: the fakes do what a stream is asked when somebody waits for it."""
    engines, host, _ = load(2, 2, peers=peers)
    monkeypatch.setattr(DeviceStream, "follow", lambda self, other: None)
    found, expected = (model.score(request(71, 12, 0), [[5, 6, 7]])[0] for model in (engines, host))
    assert not np.allclose(found.token_logprobs, expected.token_logprobs, atol=1e-2)


def test_what_is_kept_lies_where_it_is_read(load: Load):
    """Caches and bank of each part's layers on its GPU, nothing of them on another."""
    engines, _, fake = load(2, 2)
    engines.generate(request(110, 12, 2), beams=3, max_new_tokens=6)
    manifest = engines.manifest
    graphs = {graph.name: graph for graph in manifest.graphs}
    for part, device in zip(engines.engines.decoder._parts, fake.machine.devices, strict=True):  # type: ignore[attr-defined]
        bank, row = resident_bytes(contract_of(manifest, graphs[part.spec.name]))
        held = [part._bound[name] for name in part._bound if name.startswith(("past_", "media_"))]
        assert sum(buffer.nbytes for buffer in held) == bank + row
        for buffer in held:
            device.view(buffer.address, buffer.nbytes)  # else Misuse
            with pytest.raises(Misuse, match=r"memory of device \d .* was used on device \d"):
                fake.machine.devices[1 - device.index].view(buffer.address, buffer.nbytes)


@pytest.mark.slow
def test_closing_gives_everything_back_on_every_gpu(monkeypatch, tiny_model, bundle_writer, tmp_path):
    fake = install(monkeypatch, tmp_path, GIB, GIB, GIB, peers=False)
    bundle = add_engines(bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle", parts=3), tmp_path / "b.bundle", **LIMITS)
    with flamingo_export.load(bundle, backend="tensorrt-rtx", device="cuda:0,cuda:1,cuda:2") as model:
        model.generate(request(110, 12, 2), beams=3, max_new_tokens=6)
        assert all(device.used and device.graphs for device in fake.machine.devices)
    del model
    gc.collect()
    assert [(device.used, device.graphs) for device in fake.machine.devices] == [(0, 0)] * 3


def test_a_buffer_of_another_gpu_is_caught(monkeypatch, tiny_model, bundle_writer, tmp_path):
    """The stand-in does what a card would do to a wrong address, loudly."""
    install(monkeypatch, tmp_path, GIB, GIB)
    bundle = add_engines(bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle"), tmp_path / "b.bundle", **LIMITS)
    manifest, backend = read_manifest(bundle), TensorRTBackend(library.RTX)
    first, second = (
        backend.open(bundle, manifest, manifest.graph("media_kv"), SessionOptions(device=f"cuda:{gpu}")) for gpu in (0, 1)
    )
    assert (first.place, second.place) == ((2, 0), (2, 1))
    (tensor,) = first.spec.inputs
    shape = tuple(1 if isinstance(size, str) else size for size in tensor.shape)
    first.bind(tensor.name, second.allocate(tensor.name, shape))
    with pytest.raises(Misuse, match=r"memory of device 1 .* was used on device 0"):
        first.run({})
    first._cuda.use()
    with pytest.raises(Misuse, match="an engine on device 1 was used while 0 is current"):
        second._loaded.context(0, captured=False)


# Copies.


@pytest.mark.slow
@pytest.mark.parametrize("peers", [True, False])
@pytest.mark.parametrize("size", [1, 5, (1 << 22) + 3])
def test_copies_between_gpus(peers, size):
    """Of any size: through the host they go in pieces of 16 MiB. Ordered after what the source was asked, before what comes next."""
    first, second = (DeviceStream(cuda, first=True) for cuda in Machine(GIB, GIB, peers=peers).devices)
    source, target = (DeviceBuffer.zeroed(stream, (1, size), ELEMENT_TYPES["fp32"]) for stream in (first, second))
    values = np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)
    source.write(0, values[0])
    target.copy_from(source)  # not waited for
    first.cuda.fill(source.address, 0, source.nbytes, first.handle)  # comes after it was read
    assert np.array_equal(target.read()[0], values[0])
    assert not source.read().any()
    source.write(0, values[1])
    target.copy_from(source)
    del source
    gc.collect()
    assert np.array_equal(target.read()[0], values[1])


@pytest.mark.slow
@pytest.mark.parametrize("peers", [True, False])
def test_a_row_written_by_another_gpu_is_seen_once_published(peers):
    first, second = (DeviceStream(cuda, first=True) for cuda in Machine(GIB, GIB, peers=peers).devices)
    bank = DeviceBuffer.zeroed(second, (2, 4), ELEMENT_TYPES["fp32"])
    for row, byte in enumerate((1, 2)):
        tensor = DeviceTensor.empty(first, (1, 4), ELEMENT_TYPES["fp32"])
        first.cuda.fill(tensor.address, byte, tensor.nbytes, first.handle)
        bank.write(row, tensor[0])
        del tensor
        gc.collect()  # freed in the order of its stream, which comes after the copy
    seen: list[bytes] = []
    peek = lambda: seen.append(bytes(second.cuda.view(bank.address, 32)[[0, 16]]))  # type: ignore[attr-defined]  # noqa: E731
    second.cuda.ask(second.handle, peek)  # type: ignore[attr-defined]
    second.cuda.synchronize(second.handle)
    bank.publish()
    second.cuda.ask(second.handle, peek)  # type: ignore[attr-defined]
    second.cuda.synchronize(second.handle)
    assert seen == [b"\0\0", b"\1\2"]


def test_a_feed_on_another_gpu_is_copied():
    first, second = (DeviceStream(cuda, first=True) for cuda in Machine(GIB, GIB).devices)
    tensor = DeviceTensor.empty(first, (2, 3), ELEMENT_TYPES["fp32"])
    first.cuda.fill(tensor.address, 0, tensor.nbytes, first.handle)
    near = tensor.near(second)
    assert tensor.near(first) is tensor
    assert near.stream is second
    assert not near.read().any()


# Where graphs go.


def ways(names: list[str], gpus: int) -> Iterator[list[int]]:
    """Every GPU of each part, never back to an earlier one."""
    yield from (list(way) for way in itertools.combinations_with_replacement(range(gpus), len(names)))


def by_hand(needed: dict[str, Resident], room: list[int], rows: int) -> float | None:
    """Share of the fullest GPU in the best way, by trying all."""
    parts = [name for name in needed if name not in ENCODERS]
    shares = []
    for home in range(len(room)):
        for way in ways(parts, len(room)):
            used = [0] * len(room)
            used[home] += sum(needed[name].total(rows) for name in ENCODERS if name in needed)
            for name, gpu in zip(parts, way, strict=True):
                used[gpu] += needed[name].total(rows)
            if all(load <= free for load, free in zip(used, room, strict=True)):
                shares.append(max(load / free for load, free in zip(used, room, strict=True)))
    return min(shares, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_the_fullest_gpu_is_filled_least(seed):
    """Against every way there is."""
    rng = np.random.default_rng(seed)
    needed = {name: Resident(engine=int(rng.integers(1, 60))) for name in ENCODERS}
    for index in range(int(rng.integers(1, 6))):
        needed[f"decoder.{index}"] = Resident(
            engine=int(rng.integers(1, 100)), bank=int(rng.integers(0, 20)), row=int(rng.integers(1, 30))
        )
    room = [int(size) for size in rng.integers(60, 400, int(rng.integers(1, 4)))]
    found = place(needed, room, 8)
    best = next((rows for rows in range(8, 0, -1) if by_hand(needed, room, rows) is not None), None)
    if found is None:
        assert best is None
        return
    assert found.rows == best
    share = max(used / free for used, free in zip(found.used, room, strict=True))
    assert share == pytest.approx(by_hand(needed, room, found.rows))
    assert sorted(name for names in found.graphs for name in names) == sorted(needed)
    order = [name for names in found.graphs for name in names if name not in ENCODERS]
    assert order == [name for name in needed if name not in ENCODERS]
    assert found.used == tuple(sum(needed[name].total(found.rows) for name in names) for names in found.graphs)


def test_what_a_part_keeps_is_what_its_engine_is_opened_with(monkeypatch, tiny_model, bundle_writer, tmp_path):
    """The estimate, from the configuration, and the bytes of the inputs that the engine's contract names."""
    install(monkeypatch, tmp_path)
    bundle = add_engines(bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle", parts=3), tmp_path / "b.bundle", **LIMITS)
    manifest = read_manifest(bundle)
    engines = {graph.name: 7 for graph in manifest.graphs}
    found = residents(manifest.config, manifest.precision, manifest.limits, manifest.graphs, engines)
    assert [name for name in found if name not in ENCODERS] == ["decoder.0", "decoder.1", "decoder.2"]
    for graph in manifest.graphs:
        bank, row = resident_bytes(contract_of(manifest, graph))
        assert found[graph.name] == Resident(engine=7, bank=bank, row=row)


def test_graphs_go_where_there_is_room(monkeypatch, tiny_model, bundle_writer, tmp_path):
    """A small GPU takes the encoders, a large one the decoder, whichever comes first."""
    bundle = bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle", parts=2)
    fake = install(monkeypatch, tmp_path, GIB, GIB)
    made = add_engines(bundle, tmp_path / "b.bundle", **LIMITS)
    small, large = fake.machine.devices
    manifest, backend = read_manifest(made), TensorRTBackend(library.RTX)
    options = SessionOptions(device="cuda:1,cuda:0")
    small.free_memory = lambda: (9_000_000, GIB)  # type: ignore[method-assign]
    found = backend.placement(made, manifest, options)
    assert {found[name] for name in ENCODERS} | {found["decoder.0"], found["decoder.1"]} == {"cuda:0", "cuda:1"} or set(
        found.values()
    ) == {"cuda:1"}
    small.free_memory = lambda: (100, GIB)  # type: ignore[method-assign]
    assert set(backend.placement(made, manifest, options).values()) == {"cuda:1"}
    assert set(backend.placement(made, manifest, SessionOptions(device="cuda:0")).values()) == {"cuda:0"}
    assert large.index == 1


# Refusals.


@pytest.fixture
def two(monkeypatch, tiny_model, bundle_writer, tmp_path) -> tuple[Path, FakeGpu]:
    fake = install(monkeypatch, tmp_path, GIB, GIB)
    cut = bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle", parts=2)
    return add_engines(cut, tmp_path / "b.bundle", **LIMITS), fake


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:0,cuda:5", r"there is no GPU number 5 here, there is cuda:0, cuda:1\..*--device cuda:0"),
        ("cuda:0,cuda:0", "names a GPU twice"),
        ("cuda,cuda:0", "names a GPU twice"),
        ("cpu,cuda:0", r"there is no device 'cpu,cuda:0'.*or several for a decoder in parts: cuda:0,cuda:1"),
        ("cuda:0,", "there is no device"),
    ],
)
def test_devices_that_are_not_there(two, device, words):
    with pytest.raises(BackendError, match=words):
        flamingo_export.load(two[0], backend="tensorrt-rtx", device=device)


def test_a_plan_that_cannot_fit_says_what_would(two):
    bundle, fake = two
    manifest = read_manifest(bundle)
    contracts = {graph.name: contract_of(manifest, graph) for graph in manifest.graphs}
    part = max(sum(resident_bytes(contract)) for contract in contracts.values())
    for device in fake.machine.devices:
        device.free_memory = lambda: (part // 2, GIB)
    words = (
        r"does not fit on these GPUs: one request takes decoder\.0 [\d.]+ \(engine [\d.]+, media bank [\d.]+, a cache of \d+ slots [\d.]+\), "
        r"decoder\.1 .*free are cuda:0 [\d.]+ of 1\.00 GiB, cuda:1"
    )
    with pytest.raises(BackendError, match=words):
        flamingo_export.load(bundle, backend="tensorrt-rtx", device="cuda:0,cuda:1")


def test_engines_for_another_card_than_one_of_them(two, monkeypatch):
    monkeypatch.setattr(
        library, "device", lambda index=0: library.Device(target=("sm89", "sm120")[index]) if index < 2 else None
    )
    with pytest.raises(BackendError, match=r"no tensorrt-rtx engine of [\w.]+ for .*\(sm120\)"):
        flamingo_export.load(two[0], backend="tensorrt-rtx", device="cuda:0,cuda:1")
    with flamingo_export.load(two[0], device="cuda:0", threads=1) as model:
        assert model.backend.name == "tensorrt-rtx"
