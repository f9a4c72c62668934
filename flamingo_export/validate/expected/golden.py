"""Golden values: what the reference computes in every case of parity, kept so that a machine without PyTorch can check its engines.

    golden/cases.json            which weights and storage type they belong to; shape, rms, peak and PyTorch's error of each tensor; traces
    golden/tensors.safetensors   the values, fp32: samples of outputs, and the hidden states that each layer is fed with
    golden/added.safetensors     those that were recorded later, where there are any

Inputs are not stored: they follow from the case's name (`inputs.py`), pictures of token traces excepted.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import numpy as np

from flamingo_export.errors import ParityError
from flamingo_export.files import write_atomically
from flamingo_export.validate.checks.tensor_checks import Expected
from flamingo_reference.arrays import Array

GOLDEN_SCHEMA = 1
CASES_FILE = "cases.json"
TENSORS_FILE = "tensors.safetensors"
ADDED_FILE = "added.safetensors"
"""Values that were recorded later than TENSORS_FILE, which stays as it was to the last byte (`add_goldens`)."""


class GoldenText(msgspec.Struct, frozen=True, kw_only=True):
    """A hypothesis: tokens and their log-probabilities."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class GoldenTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that the reference's search, in fp64, generates for a prompt.

    media: PNG files of each medium's frames (base64 in JSON). logprobs: of the tokens. margins: of each step, and of the final ranking, as
    `flamingo_reference.search` gives them; None is infinite. torch_error, peak: see `tolerances.trace_limit`. text: what the tokens mean.
    """

    case: str
    prompt: str
    prompt_tokens: tuple[int, ...]
    media: tuple[tuple[bytes, ...], ...]
    num_beams: int
    new_tokens: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float | None, ...]
    final_margin: float | None
    torch_error: float
    peak: float
    computed_error: float | None = None
    """PyTorch's error where it computes in the storage type throughout; None where it was not asked."""
    others: tuple[GoldenText, ...] = ()
    """The other hypotheses, best first: the best beam by itself may never have changed its parent."""
    text: str | None = None


class Goldens(msgspec.Struct, kw_only=True):
    """Reference values of one model's weights in one storage type. Keys are `case|tensor`."""

    weights_sha256: str
    storage: str
    model: str
    expected: dict[str, Expected] = msgspec.field(default_factory=dict)
    computed: dict[str, float] = msgspec.field(default_factory=dict)
    """PyTorch's error in each tensor where it computes in the storage type throughout, not in fp32 on weights of that type: engines that compute
    in 16 bits are judged by it. Empty where it was not asked."""
    hidden: dict[str, Array] = msgspec.field(default_factory=dict)
    """float32 [S, W] inputs of each layer, of each sequence of the case followed layer by layer: `layer|sequence`."""
    policy_costs: dict[str, float] = msgspec.field(default_factory=dict)
    """What storing each LM layer (and the gated block before it) as the bundle does costs in PyTorch: rms of the difference from fp64 over the
    rms of what the layer adds to its input."""
    code_digests: dict[str, str] = msgspec.field(default_factory=dict)
    """Of each quantised matrix and operand: `stored_codes.codes_digest` of what the bundle must hold."""
    roundings: dict[str, float] = msgspec.field(default_factory=dict)
    """Of each matrix in int8: `stored_codes.int8_rounding` of its codes. Empty in values that earlier versions recorded."""
    traces: tuple[GoldenTrace, ...] = ()
    no_traces: str = ""
    """Why there are none, where they were left out on purpose."""

    def get(self, case: str, tensor: str) -> Expected | None:
        """What is expected of a tensor of a case, if it was recorded."""
        return self.expected.get(f"{case}|{tensor}")

    def in_16_bits(self) -> Goldens | None:
        """The same, with PyTorch's errors in 16-bit arithmetic in the place of those in fp32; None where one was not recorded."""
        if not self.expected.keys() <= self.computed.keys() or any(trace.computed_error is None for trace in self.traces):
            return None
        expected = {key: msgspec.structs.replace(value, torch_error=self.computed[key]) for key, value in self.expected.items()}
        traces = tuple(msgspec.structs.replace(trace, torch_error=trace.computed_error) for trace in self.traces)
        return msgspec.structs.replace(self, expected=expected, traces=traces)

    def put(self, case: str, tensor: str, value: Expected) -> None:
        self.expected[f"{case}|{tensor}"] = value


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    shape: tuple[int, ...]
    stride: int
    rms: float
    peak: float
    torch_error: float
    computed_error: float | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = GOLDEN_SCHEMA
    model: str
    storage: str
    weights_sha256: str
    tensors: dict[str, _Entry]
    policy_costs: dict[str, float] = msgspec.field(name="prices", default_factory=dict)
    code_digests: dict[str, str] = msgspec.field(name="codes", default_factory=dict)
    roundings: dict[str, float] = msgspec.field(default_factory=dict)
    traces: tuple[GoldenTrace, ...]
    no_traces: str = ""


def save_goldens(folder: Path, goldens: Goldens) -> None:
    """Writes both files into `folder`, the tensors first: cases.json is there only when all is there."""
    from safetensors.numpy import save

    arrays = _expected(goldens.expected)
    arrays |= {f"hidden|{key}": np.ascontiguousarray(value, np.float32) for key, value in goldens.hidden.items()}
    write_atomically(folder / TENSORS_FILE, save(arrays))
    (folder / ADDED_FILE).unlink(missing_ok=True)
    _write_cases(folder, goldens)


def add_goldens(folder: Path, goldens: Goldens, more: Goldens) -> Goldens:
    """Adds to `goldens`, which lie in `folder`, the cases of `more` that they lack; what is there stays to the last byte."""
    from safetensors.numpy import save

    added = sorted(more.expected.keys() - goldens.expected.keys())
    arrays = {key: value for key, value in _loaded(folder).items() if key in _stored(folder / ADDED_FILE)}
    goldens.expected |= {key: more.expected[key] for key in added}
    goldens.computed |= {key: more.computed[key] for key in added if key in more.computed}
    write_atomically(folder / ADDED_FILE, save(arrays | _expected({key: more.expected[key] for key in added})))
    _write_cases(folder, goldens)
    return goldens


def _expected(values: dict[str, Expected]) -> dict[str, Array]:
    return {f"expected|{key}": value.values.astype(np.float32) for key, value in values.items()}


def _loaded(folder: Path) -> dict[str, Array]:
    """All arrays of a folder. Raises SafetensorError or OSError."""
    return _stored(folder / TENSORS_FILE) | _stored(folder / ADDED_FILE)


def _stored(path: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return dict(load_file(path)) if path.name == TENSORS_FILE or path.is_file() else {}


def _write_cases(folder: Path, goldens: Goldens) -> None:
    entries = {
        key: _Entry(
            shape=value.shape,
            stride=value.stride,
            rms=value.rms,
            peak=value.peak,
            torch_error=value.torch_error,
            computed_error=goldens.computed.get(key),
        )
        for key, value in goldens.expected.items()
    }
    document = _File(
        model=goldens.model,
        storage=goldens.storage,
        weights_sha256=goldens.weights_sha256,
        tensors=entries,
        policy_costs=goldens.policy_costs,
        code_digests=goldens.code_digests,
        roundings=goldens.roundings,
        traces=goldens.traces,
        no_traces=goldens.no_traces,
    )
    write_atomically(folder / CASES_FILE, msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


def load_goldens(folder: Path, bundle: Path | None = None) -> Goldens | None:
    """The golden values in `folder`, or None where none were recorded. bundle: whose they are, for messages.

    Raises ParityError if they are damaged or of a newer schema.
    """
    from safetensors import SafetensorError

    path = folder / CASES_FILE
    if not path.is_file():
        return None
    how = f": flamingo-export parity {shlex.quote(str(bundle))}" if bundle is not None else ""
    advice = f"Record them again on a machine with PyTorch{how}."
    try:
        document = msgspec.json.decode(path.read_bytes(), type=_File)
        if document.schema != GOLDEN_SCHEMA:
            raise ParityError(f"{path} has schema {document.schema}, this version reads {GOLDEN_SCHEMA}. {advice}")
        arrays = _loaded(folder)
        expected = {
            key: Expected(
                values=arrays[f"expected|{key}"].astype(np.float64),
                shape=entry.shape,
                stride=entry.stride,
                rms=entry.rms,
                peak=entry.peak,
                torch_error=entry.torch_error,
            )
            for key, entry in document.tensors.items()
        }
    except (msgspec.MsgspecError, SafetensorError, OSError, KeyError) as error:
        raise ParityError(f"golden values in {folder} are damaged ({type(error).__name__}: {error}). {advice}") from error
    return Goldens(
        weights_sha256=document.weights_sha256,
        storage=document.storage,
        model=document.model,
        expected=expected,
        computed={key: entry.computed_error for key, entry in document.tensors.items() if entry.computed_error is not None},
        hidden={key.removeprefix("hidden|"): value for key, value in arrays.items() if key.startswith("hidden|")},
        policy_costs=document.policy_costs,
        code_digests=document.code_digests,
        roundings=document.roundings,
        traces=document.traces,
        no_traces=document.no_traces,
    )
