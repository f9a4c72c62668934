"""A second opinion: golden values re-checked by Polygraphy's own runner and comparator, code that is not ours.

The cases and their feeds are parity's; what runs a graph is Polygraphy's ONNX Runtime runner, and what compares is its comparator, each output
with an absolute tolerance that parity's table gives. Caches go through the host from call to call, since its runner binds nothing.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_export.backends.base import (
    Availability,
    Buffer,
    Capabilities,
    HostSession,
    SessionOptions,
    Tensor,
    check_feeds,
    on_host,
)
from flamingo_export.backends.external_data import loadable
from flamingo_export.backends.host_array import HostArray
from flamingo_export.backends.placement import on_one
from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.errors import BackendError, InputError, ParityError, pip_install
from flamingo_export.precision import StorageType
from flamingo_export.progress import SILENT, Progress
from flamingo_export.specs import SubgraphSpec, decoder_spec, subgraph_specs
from flamingo_export.validate.checks.checker import Checker
from flamingo_export.validate.expected.golden import load_goldens
from flamingo_export.validate.expected.media_rounding import FLOATS
from flamingo_export.validate.tolerances import Tolerance, tolerance
from flamingo_reference.arrays import Array

GOLDEN_FOLDER = "golden"
_KINDS: dict[str, Any] = {"float": np.float32, "fp32": np.float32, "int64": np.int64, "bool": np.bool_}


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of one case: whether Polygraphy's comparator passed it, its largest absolute difference and what was allowed, and whether ours
    passed it."""

    case: str
    tensor: str
    passed: bool
    difference: float
    allowed: float
    ours: bool


class PolygraphyReport(msgspec.Struct, frozen=True, kw_only=True):
    """Every comparison. `disagreements`: those that Polygraphy and this package judge differently."""

    version: str
    model: str
    comparisons: tuple[Comparison, ...]
    not_run: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all cases were run and every output is within its limit."""
        return bool(self.comparisons) and not self.not_run and all(each.passed for each in self.comparisons)

    @property
    def disagreements(self) -> tuple[Comparison, ...]:
        return tuple(each for each in self.comparisons if each.passed != each.ours)


def require_polygraphy() -> None:
    """Raises ParityError with what to install where Polygraphy is not installed."""
    if importlib.util.find_spec("polygraphy") is None:
        raise ParityError(f"Polygraphy is not installed: {pip_install('debug')}")


def check_with_polygraphy(bundle: Path, *, export: Path | None = None, progress: Progress = SILENT) -> PolygraphyReport:
    """Runs parity's cases of the bundle's portable graphs by Polygraphy and compares them with its golden values.

    export: a folder for each graph's inputs and outputs in Polygraphy's JSON. Raises ParityError where Polygraphy is not installed, the bundle
    has no golden values, or keeps media in FP8, which Polygraphy's runner cannot be fed.
    """
    require_polygraphy()
    import polygraphy

    manifest = open_bundle(bundle)
    goldens = load_goldens(bundle / GOLDEN_FOLDER)
    if goldens is None:
        raise ParityError(
            f"{bundle} has no golden values. Record them where PyTorch is installed: flamingo-export parity {shlex.quote(str(bundle))}"
        )
    if manifest.precision.media == "fp8":
        raise ParityError(f"{bundle} keeps media in FP8, which Polygraphy's runner cannot be fed. Check it by parity only.")
    backend = PolygraphyBackend()
    checker = _Collector(bundle, manifest, goldens, FLOATS, backend, SessionOptions(threads=1), progress)
    with silenced():
        checker.run(whole=True, layers=None)
        comparisons = tuple(_compare(each) for each in checker.collected)
        if export is not None:
            _export(export, backend)
    failed = [row for row in checker.rows if not row.passed and row.error is None]
    return PolygraphyReport(
        version=polygraphy.__version__,
        model=manifest.config.name,
        comparisons=comparisons,
        not_run=tuple(f"{row.case}, {row.tensor}: {row.note}" for row in failed),
    )


class _Collected(msgspec.Struct, frozen=True, kw_only=True):
    case: str
    tensor: str
    expected: Array
    actual: Array
    allowed: float
    ours: bool


class _Collector(Checker):
    """Parity's cases, each gate's numbers kept for another judge."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.collected: list[_Collected] = []

    def _gate(
        self,
        level: Any,
        case: str,
        subgraph: str,
        tensor: str,
        actual: Any,
        *,
        kind: str,
        note: str = "",
        limits: Tolerance | None = None,
    ) -> Any:
        row = super()._gate(level, case, subgraph, tensor, actual, kind=kind, note=note, limits=limits)
        expected = self.goldens.get(case, tensor)
        if expected is not None and actual is not None and tuple(actual.shape) == expected.shape:
            rule = limits or tolerance(kind, self.manifest.precision)
            share = rule.limit(torch_error=expected.torch_error, peak=expected.relative_peak)
            self.collected.append(
                _Collected(
                    case=case,
                    tensor=tensor,
                    expected=expected.values,
                    actual=np.asarray(actual).reshape(-1)[:: expected.stride].astype(np.float64),
                    allowed=share * (expected.rms or 1.0),
                    ours=row.passed,
                )
            )
        return row


def _compare(collected: _Collected) -> Comparison:
    """What Polygraphy's comparator says of two runs."""
    from polygraphy import comparator

    # Its older name was a member of CompareFunc.
    simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple
    judge = simple(atol=collected.allowed, rtol=0.0, check_error_stat="max", infinities_compare_equal=False)
    right, found = (
        comparator.IterationResult(outputs={collected.tensor: values}) for values in (collected.expected, collected.actual)
    )
    result = judge(right, found)[collected.tensor]
    return Comparison(
        case=collected.case,
        tensor=collected.tensor,
        passed=bool(result),
        difference=float(result.max_absdiff) if result.max_absdiff is not None else math.nan,
        allowed=collected.allowed,
        ours=collected.ours,
    )


class PolygraphyBackend:
    """Follows backends.base.Backend: sessions are Polygraphy's ONNX Runtime runners."""

    name = "polygraphy"
    capabilities = Capabilities(fp8_products=False, widens_weights=True)
    native_functions: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.last: dict[str, tuple[Path, dict[str, Array], dict[str, Array]]] = {}
        """Graph -> (its file, inputs and outputs of its last call)."""

    def availability(self) -> Availability:
        return Availability(usable=True, detail="Polygraphy's ONNX Runtime runner, CPU")

    def arithmetic(self, manifest: Manifest, options: SessionOptions) -> StorageType:
        """fp32: the portable graphs widen what is stored."""
        return "fp32"

    def placement(self, bundle: Path, manifest: Manifest, options: SessionOptions) -> Mapping[str, str]:
        """All where the options say."""
        return on_one(manifest, options)

    def build(self, bundle: Path, manifest: Manifest, graph: GraphRecord) -> EngineRecord | None:
        """None: the portable graphs are run."""
        return None

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> PolygraphySession:
        spec = (
            subgraph_specs(manifest.config, media=manifest.precision.media)[graph.name]
            if graph.layers is None
            else decoder_spec(manifest.config, range(*graph.layers), name=graph.name, media=manifest.precision.media)
        )
        return PolygraphySession(bundle, bundle / graph.file, spec, self)


class _HostArray(HostArray):
    """A buffer of the host."""

    def rows(self, first: int, count: int) -> _HostArray:
        return _HostArray(self.array[first : first + count])

    def view(self, shape: tuple[int, ...]) -> _HostArray:
        return _HostArray(self.array.reshape(-1)[: math.prod(shape)].reshape(shape))


def _of_links(graph: Path | bytes, folder: Path) -> Any:
    """A session of ONNX Runtime on weights that lie below a folder, wherever the graph is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class PolygraphySession(HostSession):
    """A graph in Polygraphy's runner; what is bound is fed and read back at each call."""

    def __init__(self, bundle: Path, path: Path, spec: SubgraphSpec, backend: PolygraphyBackend) -> None:
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

        self._path, self._spec, self._backend = path, spec, backend
        source, folder = loadable(bundle, path)
        # Polygraphy's own loader takes no options, which weights behind links need.
        opened = SessionFromOnnx(str(path), providers=["cpu"]) if folder is None else lambda: _of_links(source, folder)
        self._runner = OnnxrtRunner(opened)
        self._runner.activate()
        self._bound: dict[str, _HostArray] = {}

    @property
    def spec(self) -> SubgraphSpec:
        return self._spec

    def allocate(self, name: str, shape: tuple[int, ...]) -> _HostArray:
        return _HostArray(np.zeros(shape, _KINDS[self._spec.input(name).kind]))

    def bind(self, name: str, buffer: Buffer) -> None:
        if not isinstance(buffer, _HostArray):
            raise InputError(f"{self._spec.name}: a buffer of another backend was bound to {name}")
        self._bound[name] = buffer

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        check_feeds(self._spec, feeds, self._bound)
        given = {name: on_host(name, value) for name, value in feeds.items()}
        given |= {name: buffer.array for name, buffer in self._bound.items()}
        try:
            found = {name: np.array(value) for name, value in self._runner.infer(given).items()}
        except Exception as error:  # Polygraphy's own, and ONNX Runtime's through it
            raise BackendError(f"{self._spec.name} failed in Polygraphy: {error}") from error
        self._backend.last[self._spec.name] = self._path, {name: value.copy() for name, value in given.items()}, found
        for output, source in self._spec.aliases.items():
            self._bound[source].array[...] = found[output]
        own = {name: value for name, value in found.items() if name not in self._spec.aliases}
        return own if outputs is None else {name: own[name] for name in outputs}

    def close(self) -> None:
        if self._runner.is_active:
            self._runner.deactivate()


@contextmanager
def silenced() -> Iterator[None]:
    """Polygraphy tells its own story on stdout; ours is the report."""
    import onnxruntime
    from polygraphy.logger import G_LOGGER

    onnxruntime.set_default_logger_severity(3)  # it warns of each cache that is copied, which here all are
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)


def _export(folder: Path, backend: PolygraphyBackend) -> None:
    """Inputs and outputs of each graph's last call that was compared, as `polygraphy run` loads them."""
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, given, found) in backend.last.items():
        save_json([given], str(folder / f"{name}.inputs.json"), description="inputs")
        save_json(
            RunResults([("flamingo-export", [IterationResult(outputs=found)])]),
            str(folder / f"{name}.outputs.json"),
            description="outputs",
        )


def commands(bundle: Path, manifest: Manifest, folder: Path | None = None) -> tuple[str, ...]:
    """What to type to use Polygraphy itself. folder: where inputs and outputs were exported."""
    found = [] if folder is not None else [f"flamingo-export parity {shlex.quote(str(bundle))} --with polygraphy"]
    for graph in manifest.graphs:
        path = shlex.quote(str(bundle / graph.file))
        if folder is None:
            found.append(f"polygraphy inspect model {path} --show layers")
        else:
            loaded = " ".join(
                f"--load-{what} {shlex.quote(str(folder / f'{graph.name}.{what}.json'))}" for what in ("inputs", "outputs")
            )
            found.append(f"polygraphy run {path} --onnxrt {loaded} --atol 1e-4 --rtol 0")
    return tuple(found)
