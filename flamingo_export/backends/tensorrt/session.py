"""One engine, opened: feeds go in through pinned memory, results come back through it, everything else stays on the device.

    feed (host, float32) --round--> pinned --copy--> input                        a bound buffer is its input's address,
                                                      |  engine                   and that of the output which aliases it
    result (host, float32) <--widen-- pinned <--copy-- output (only those asked for)

Everything between the two pinned blocks is one sequence on the session's stream. In decoding the same engine with the same shapes and rows comes
back at every step, so it is captured as a CUDA graph the third time, one for each set of shapes and of rows that are bound, and launched from
then on. A graph belongs to the context that it was captured from, which must not be touched afterwards: each has one of its own, and shapes
that come once or twice share one. Binding other rows, as requests that join and leave make it, drops no graph: the rows that come back find
theirs. Of a step that has a graph only what differs is sent (`sending.py`), and a step can be asked for before the one before it is
read (`start`): its tokens are then taken from where that one leaves them.
"""

from __future__ import annotations

import gc
import logging
import math
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from flamingo_export.backends.base import Buffer, Handed, Tensor
from flamingo_export.backends.tensorrt.device_memory import DeviceBuffer, DeviceTensor, Memory
from flamingo_export.backends.tensorrt.dtypes import ElementType, decode
from flamingo_export.backends.tensorrt.engine_contract import Contract
from flamingo_export.backends.tensorrt.engine_loading import Opened, failure, first_error
from flamingo_export.backends.tensorrt.feeds import Feeds, Given, Sent
from flamingo_export.backends.tensorrt.handing import Hand
from flamingo_export.backends.tensorrt.launch import Call, Result, plan
from flamingo_export.backends.tensorrt.log import BuilderMessages, listening
from flamingo_export.backends.tensorrt.lowering.shapes import DECODE
from flamingo_export.backends.tensorrt.result_buffers import TOKENS, Arrivals, DeviceRun, Slot
from flamingo_export.backends.tensorrt.slots import check_mask, check_writes
from flamingo_export.errors import BackendError, InputError
from flamingo_export.specs import TOP_IDS, TOP_VALUES, SubgraphSpec, TensorSpec
from flamingo_reference.arrays import Array

MAX_GRAPHS = 16
"""CUDA graphs kept at once, the one launched longest ago going first: rows leave a batch one by one, each time with other shapes."""
CAPTURED_AT = 3
"""The time that a step comes at which it is captured: shapes of a batch that shrinks or grows often come once or twice."""
MAX_SEEN = 256
CHECK_MASKS = False
"""Whether each call's mask is compared with the slots in use; tests turn it on."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Step:
    """The graph of calls of one set of shapes and addresses, the context that it was captured from, and how its feeds are sent."""

    context: Any
    graph: int
    sent: Sent


class TensorRTSession:
    """One engine. Not for use from several threads at once."""

    reads_bound_media = False  # rows are read where they lie; others cost nothing, and captured steps keep their addresses

    def __init__(self, loaded: Opened, contract: Contract, *, asynchronous: bool, captures: bool = True) -> None:
        """asynchronous: it has a stream that others do not wait for. captures: whether steps may become CUDA graphs."""
        self._loaded, self._contract, self._stream = loaded, contract, loaded.stream
        self._cuda = self._stream.cuda
        self.asynchronous = asynchronous
        spec = contract.spec
        self._inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in spec.outputs if tensor.name not in spec.aliases}
        self._alias_of = {source: output for output, source in spec.aliases.items()}
        self._closed = False
        self._bound: dict[str, DeviceBuffer] = {}
        self._results: dict[str, Memory] = {}
        self._arrivals = Arrivals(self._stream)
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._contexts: dict[int, Any] = {}
        self._steps: OrderedDict[tuple[Any, ...], Step] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], int] = OrderedDict()
        """How often a step was run that has no graph yet."""
        self._binding_now: tuple[tuple[int, tuple[int, ...]], ...] | None = None
        self._capturing = captures
        self._captured_profiles = frozenset(
            index for index, profile in enumerate(contract.profiles) if profile.name.startswith(DECODE)
        )
        """Those of decoding steps: their calls are short, many, and alike."""
        self._activations = self._stream.activations
        self._feeds = Feeds(self._stream, contract, self._captured_profiles, self._forget_graphs)

    @property
    def spec(self) -> SubgraphSpec:
        return self._contract.offered

    @property
    def place(self) -> Hashable:
        """Its GPU."""
        return self._stream.device

    @property
    def largest(self) -> Mapping[str, int]:
        """Largest size of each letter in any profile, and the caches' capacity."""
        found: dict[str, int] = {"C": self._contract.capacity} if self.spec.aliases else {}
        for profile in self._contract.profiles:
            for symbol, bounds in profile.bounds.items():
                found[symbol] = max(found.get(symbol, 0), bounds.most)
        return MappingProxyType(found)

    def allocate(self, name: str, shape: tuple[int, ...]) -> DeviceBuffer:
        """A zeroed buffer on the device for input `name`. Raises DeviceMemoryError, which is a MemoryError too."""
        return DeviceBuffer.zeroed(self._stream, shape, self._element(name))

    def bind(self, name: str, buffer: Buffer) -> None:
        """Input `name`, and the output that aliases it, or output `name`, are this buffer from now on. Raises InputError for one that
        does not fit."""
        if not isinstance(buffer, DeviceBuffer) or buffer.element is not self._element(name):
            raise InputError(
                f"{self.spec.name}: a buffer of another backend was bound to {name}; allocate it with this session"
            )
        self._check_open()
        before = self._bound.get(name)
        if before is buffer:
            return
        self._bound[name] = buffer
        self._binding_now = None

    def _binding(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Where everything that is bound lies, and in which shape: graphs and checked calls are good for what was bound then."""
        if self._binding_now is None:
            self._binding_now = tuple((buffer.address, buffer.shape) for buffer in self._bound.values())
        return self._binding_now

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be asked for with tokens of the one before."""
        return TOP_IDS in self._outputs and self._cuda.step_kernels

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        """Results on the host. Raises InputError for feeds that break the contract or the profiles, BackendError if running fails."""
        call, asked = self._start(feeds, outputs, None)
        if asked is None:
            self._wait_for_foreign(feeds)
            return {result.name: np.zeros(result.shape, decode(np.empty(0, result.element.storage), result.element).dtype)
                    for result in call.wanted}  # fmt: skip
        self._cuda.synchronize(self._stream.handle)
        self._feeds.in_flight = False
        return asked.read()

    def start(
        self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None, handed: Handed | None = None
    ) -> DeviceRun:
        """As `run`, returning before it is done. handed: tokens that are chosen of what the last run leaves. Raises as `run` does."""
        _, asked = self._start(feeds, outputs, handed)
        if asked is None:
            raise InputError(f"{self.spec.name}: a step that is not waited for gives results")
        self._wait_for_foreign(feeds)
        return asked

    def _start(
        self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None, handed: Handed | None
    ) -> tuple[Call, DeviceRun | None]:
        taken = self._taken(feeds)
        call = self._call(taken, outputs)
        self._check_slots(feeds)
        slot = self._arrivals.next()
        hand = None if handed is None else self._hand(handed, slot)
        places = {result.name: self._result(result).address for result in call.outputs}
        self._ask(call, taken, places, lasting=True, hand=hand)
        if call.empty:
            return call, None
        drawn = call.shapes[TOKENS] if hand is not None and hand.draws else None
        return call, self._arrivals.fetch(slot, call.wanted, self._results, drawn)

    def _hand(self, handed: Handed, slot: Slot) -> Hand:
        """Where the tokens that are handed over come from. Raises InputError if no run has left any."""
        found = [self._results.get(name) for name in (TOP_IDS, TOP_VALUES)]
        if None in found or not self.runs_ahead:
            raise InputError(f"{self.spec.name}: no run has left candidates of which tokens could be taken")
        n = self._outputs[TOP_IDS].shape[-1]
        assert isinstance(n, int)
        ids, values = found
        assert ids is not None
        assert values is not None
        return Hand(handed=handed, ids=ids, values=values, n=n, slot=slot)

    def compute(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Results on the device, for what its stream does from now on; returns before they are worked out. Raises as `run` does."""
        taken = self._taken(feeds)
        call = self._call(taken, ())
        self._check_slots(feeds)
        tensors = {result.name: DeviceTensor.empty(self._stream, result.shape, result.element) for result in call.outputs}
        self._ask(call, taken, {name: tensor.address for name, tensor in tensors.items()}, lasting=not tensors)
        self._wait_for_foreign(feeds)
        return tensors

    def close(self) -> None:
        """Waits, and frees engine, contexts and graphs; buffers stay valid."""
        if self._closed:
            return
        self._closed = True
        self._cuda.synchronize(self._stream.handle)
        self._forget_graphs()
        self._contexts = {}
        self._loaded.close()
        self._feeds.close()
        self._arrivals.close()
        self._bound, self._results, self._calls = {}, {}, {}

    # What a call is.

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(f"{self.spec.name}: the session is closed. Load the bundle again.")

    def _element(self, name: str) -> ElementType:
        tensor = self._inputs.get(name) or self._outputs.get(name)
        if tensor is None:
            raise InputError(f"{self.spec.name}: {name} is not an input, nor an output with memory of its own")
        return self._contract.element(tensor)

    def _taken(self, feeds: Mapping[str, Tensor]) -> dict[str, Array | DeviceTensor]:
        """Feeds of the host as they are, those on the device as ours, those on another GPU copied to it."""
        return {
            name: value
            if isinstance(value, np.ndarray)
            else (value if isinstance(value, DeviceTensor) else DeviceTensor.taken(value, self._stream)).near(self._stream)
            for name, value in feeds.items()
        }  # fmt: skip

    def _wait_for_foreign(self, feeds: Mapping[str, Tensor]) -> None:
        """Tensors that are not freed in the order of this stream are kept only by the caller, until it learns that they were read."""
        own = (
            isinstance(value, np.ndarray)
            or (
                isinstance(value, DeviceTensor) and (value.stream is self._stream or value.stream.device != self._stream.device)
            )
            for value in feeds.values()
        )
        if not all(own):
            self._cuda.synchronize(self._stream.handle)

    def _call(self, feeds: Given, wanted: Collection[str] | None) -> Call:
        """The call that feeds of these shapes are; the contract is checked once for each set of shapes, not at each step."""
        key = (
            *((name, value.shape, value.dtype, isinstance(value, DeviceTensor)) for name, value in feeds.items()),
            None if wanted is None else tuple(wanted),
            self._binding(),
        )
        known = self._calls.get(key)
        if known is None:
            self._check_open()
            if len(self._calls) > 256:  # prompts of ever new lengths must not fill memory
                self._calls.clear()
            known = self._calls[key] = plan(self._contract, feeds, self._bound, wanted)
        return known

    def _check_slots(self, feeds: Mapping[str, Tensor]) -> None:
        """Engines ignore writes past their capacity in silence. Raises InputError."""
        if self._alias_of:
            check_writes(self.spec.name, feeds, self._contract.capacity)
            if CHECK_MASKS:
                check_mask(self.spec.name, feeds)

    # Memory.

    def _most(self, tensor: TensorSpec, profile: int) -> int:
        """Bytes of an output at most in a profile."""
        bounds = self._contract.profiles[profile].bounds
        shape = self._contract.shape(tensor, {symbol: size.most for symbol, size in bounds.items()})
        return math.prod(shape) * self._contract.element(tensor).size

    def _result(self, result: Result) -> Memory:
        """Memory of an output: what the profiles whose calls are captured want at most, or more where a call wants more."""
        held = self._results.get(result.name)
        if held is None or held.size < result.nbytes:
            self._forget_graphs()
            tensor = self._contract.spec.output(result.name)
            profiles = self._captured_profiles or {len(self._contract.profiles) - 1}
            size = max(result.nbytes, *(self._most(tensor, index) for index in profiles))
            self._results.pop(result.name, None)
            held = self._results[result.name] = Memory(self._stream, size)
        return held

    def _addresses(self, feeds: Given, outputs: dict[str, int], fed: Mapping[str, int] | None = None) -> dict[str, int]:
        """Where each input and output lies. A tensor of another stream is waited for. fed: where feeds of the host lie, if not in memory of
        their own."""
        found = {name: self._bound[name].address for name in self._outputs if name in self._bound} | outputs
        for name in self._inputs:
            value = feeds.get(name)
            if isinstance(value, DeviceTensor):
                found[name] = value.address
                self._stream.follow(value.stream)
            elif value is not None:
                found[name] = self._feeds.address(name) if fed is None else fed[name]
            else:
                found[name] = self._bound[name].address
                if name in self._alias_of:
                    found[self._alias_of[name]] = found[name]
        return found

    # Running.

    def _ask(
        self,
        call: Call,
        feeds: Given,
        outputs: dict[str, int],
        *,
        lasting: bool,
        hand: Hand | None = None,
    ) -> None:
        """Asks a call of the stream. lasting: the outputs' addresses are the same at the next call of these shapes, so it may be captured."""
        self._cuda.use()  # steps may run on another thread than the one that opened the engine
        if self._activations is not self._stream.activations:
            self._forget_graphs()
            self._activations = self._stream.activations
        with listening(self._loaded.trt, messages := BuilderMessages()):
            if lasting and call.profile in self._captured_profiles and len(call.fed) == len(feeds) and not call.empty:
                self._step(call, feeds, outputs, messages, hand)
            else:
                self._run(call, feeds, outputs, messages, hand)

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._loaded.context(profile, captured=False)
        return self._contexts[profile]

    def _set(self, context: Any, call: Call, addresses: dict[str, int], messages: BuilderMessages) -> None:
        """Shapes, addresses and memory of a context."""
        done = all(context.set_input_shape(name, shape) for name, shape in call.shapes.items())
        done = done and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done:
            raise BackendError(f"{self.spec.name}: TensorRT did not take a shape or an address: {first_error(messages)}")
        memory = self._stream.activations
        if memory is not None:
            context.set_device_memory(memory.address, memory.size)

    def _enqueue(self, context: Any, messages: BuilderMessages) -> None:
        """Asks the engine of the stream. Raises BackendError."""
        if not context.execute_async_v3(self._stream.handle):
            raise failure(self._stream, f"{self.spec.name} failed in TensorRT {self._loaded.trt.__version__}", messages)

    def _run(self, call: Call, feeds: Given, outputs: dict[str, int], messages: BuilderMessages, hand: Hand | None) -> None:
        """A call as it is, in the context that all calls of its profile share."""
        context = self._context(call.profile)
        self._set(context, call, self._addresses(feeds, outputs), messages)
        self._feeds.whole(call, feeds)
        if hand is not None:
            self._feeds.hand(call, hand)
        self._enqueue(context, messages)

    def _step(self, call: Call, feeds: Given, outputs: dict[str, int], messages: BuilderMessages, hand: Hand | None) -> None:
        """A call that may come again and again: run twice as any other, then in a context of its own and captured, then launched."""
        key = (call.key, self._binding())
        step = self._steps.get(key)
        if step is not None:
            self._steps.move_to_end(key)
            self._feeds.differing(step.sent, call, feeds, hand)
            self._cuda.launch(step.graph, self._stream.handle)
            return
        count = self._seen.pop(key, 0) + 1
        if count < CAPTURED_AT or not self._capturing:
            self._seen[key] = count
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            self._run(call, feeds, outputs, messages, hand)
            return
        self._make_room()
        sent = self._feeds.step(call)
        context = self._loaded.context(call.profile, captured=True)
        self._set(context, call, self._addresses(feeds, outputs, self._feeds.addresses(sent)), messages)
        self._feeds.differing(sent, call, feeds, hand)
        self._enqueue(context, messages)  # which TensorRT wants before a capture
        graph = self._captured(context, messages)
        if graph is not None:
            self._steps[key] = Step(context=context, graph=graph, sent=sent)

    def _captured(self, context: Any, messages: BuilderMessages) -> int | None:
        """The engine as a graph, or None where it cannot be one, which is said once."""
        cuda, stream = self._cuda, self._stream.handle
        # What the garbage collector frees within a capture would end it: freeing device memory waits, which a capture may not.
        collecting = gc.isenabled()
        gc.disable()
        try:
            cuda.begin_capture(stream)
            try:
                self._enqueue(context, messages)
            except BackendError:
                cuda.abandon_capture(stream)
                raise
            return cuda.end_capture(stream)
        except BackendError as error:
            self._capturing = False
            _log.warning("%s: steps are not captured as CUDA graphs and take longer: %s", self.spec.name, error)
            return None
        finally:
            if collecting:
                gc.enable()

    def _make_room(self) -> None:
        if len(self._steps) >= MAX_GRAPHS:
            self._cuda.synchronize(self._stream.handle)  # after `compute` it may be under way
        while len(self._steps) >= MAX_GRAPHS:
            _, oldest = self._steps.popitem(last=False)
            self._drop(oldest)

    def _forget_graphs(self) -> None:
        """Graphs hold addresses and shapes: when one changes, they are captured anew."""
        if self._steps:
            self._cuda.synchronize(self._stream.handle)
        while self._steps:
            self._drop(self._steps.popitem()[1])

    def _drop(self, step: Step) -> None:
        self._cuda.destroy_graph(step.graph)
