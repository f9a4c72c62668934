"""The calibration table: how large the activations of a model become, by tensor. Written by `flamingo_calibration`, read by quantisation.

Keys are the bundle's names of matrices, and mean what is multiplied with them:

    decoder/layer.3/self_attention/qkv_proj     input of the product with this weight, [..., in]; so for every matrix of a bundle
    text_tower/layer.0/ffw_up                   of a contrastive encoder as well, where the model has one
    decoder/head                                input of the head, also where it is the embedding
    decoder/layer.3/self_attention/q, k, v      operands of attention, as they enter it: turned, biases added
    media_kv/layer.0/k, v                       what the bank keeps of a medium

Several matrices side by side (qkv_proj) have one input and one key.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.bundle.manifest import CalibrationRecord
from flamingo_export.errors import CalibrationError
from flamingo_export.files import write_atomically
from flamingo_export.weights import bundle_weights
from flamingo_export.weights.towers import OF_TOWERS
from flamingo_reference.config import ModelConfig

SCHEMA_VERSION = 2
"""2: ranges of a contrastive encoder's towers, and the digest of these."""
CALIBRATION_FILE = "calibration.json"
"""Where a bundle keeps the table that it was quantised with."""
Method = Literal["amax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
_SHOWN_NAMES = 8
_LARGEST = float(np.finfo(np.float32).max)
"""Magnitude that the fp32 reference can have; a scale beyond it is infinite where it is stored."""
CALIBRATE_AGAIN = "Calibrate again: flamingo-export calibrate --checkpoint ... --out calibration.json"


class Statistics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor: the largest magnitude that is kept, by each method, in the tensor's own unit. All 0 where only zeros were seen.

    amax: the largest seen. percentile: 99.99 % of the numbers that are not zero are at most this. mse: least squared error of E4M3.
    entropy: least divergence of the distribution in E4M3. channel_rms: root mean square of each input channel over that of the whole
    tensor, base64 of little-endian float16; empty for operands of attention and where only zeros were seen.
    """

    amax: float
    percentile: float
    mse: float
    entropy: float
    channel_rms: str = ""

    def channels(self) -> npt.NDArray[np.float16]:
        """`channel_rms` as an array, float16 [in]; of length 0 where it is empty."""
        return np.frombuffer(base64.b64decode(self.channel_rms, validate=True), "<f2")


class CalibrationTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Statistics of a model's activations on some data.

    weights_sha256, towers_sha256: as in a bundle's `source`; the latter None without a contrastive encoder. data_sha256: of token ids
    and decoded images, in order. method: the one that quantisation takes by default. tokens and images: positions and media of all
    samples.
    """

    schema_version: int
    model: str
    weights_sha256: str
    data_sha256: str
    method: Method
    samples: int
    tokens: int
    images: int
    tensors: dict[str, Statistics]
    towers_sha256: str | None = None

    def threshold(self, name: str, method: Method | None = None) -> float:
        """The magnitude that the largest quantised number stands for; always positive. method: None takes the table's.

        1.0 where only zeros were seen: zero is exact under any scale. Raises CalibrationError for a tensor that the table lacks.
        """
        if name not in self.tensors:
            raise CalibrationError(f"the calibration table of {self.model} has no tensor {name!r}. {CALIBRATE_AGAIN}")
        value: float = getattr(self.tensors[name], method or self.method)
        return value or 1.0

    def rms(self, name: str) -> npt.NDArray[np.float32]:
        """Root mean squares of an input's channels, up to a common factor; empty where only zeros were seen, or nothing: towers in tables
        from before these had ranges."""
        found = self.tensors.get(name)
        return np.empty(0, np.float32) if found is None else found.channels().astype(np.float32)


def calibrated_tensors(config: ModelConfig) -> dict[str, int]:
    """Keys of a model's table, in the order of the bundle's weights, with the number of input channels (0: an operand of attention)."""
    lm = config.language_model
    products = {weight.name: weight.shape[0] for weight in bundle_weights(config) if weight.product}
    operands = [f"media_kv/layer.{i}/{kind}" for i in range(len(config.gated_layers)) for kind in "kv"]
    operands += [f"decoder/layer.{layer}/self_attention/{kind}" for layer in range(lm.num_layers) for kind in "qkv"]
    return products | {"decoder/head": lm.width} | dict.fromkeys(operands, 0)


def has_towers(table: CalibrationTable) -> bool:
    """Whether the table has ranges of a contrastive encoder. Older ones have none, and serve wherever the policy wants none."""
    return any(name.startswith(OF_TOWERS) for name in table.tensors)


def check_fits(
    table: CalibrationTable, config: ModelConfig, weights_sha256: str | None, towers_sha256: str | None = None
) -> None:
    """Raises CalibrationError unless the table is of these weights: the `source.sha256` and `source.towers_sha256` of their bundle. A table
    of the model without its contrastive encoder fits the model with it, and the other way round."""
    if table.weights_sha256 != weights_sha256:
        raise CalibrationError(
            f"the calibration table is of other weights ({table.model}, {table.weights_sha256[:12]}) than these "
            f"({config.name}, {(weights_sha256 or 'unknown')[:12]}). {CALIBRATE_AGAIN}"
        )
    if config.contrastive is not None and table.towers_sha256 and towers_sha256 and table.towers_sha256 != towers_sha256:
        raise CalibrationError(
            f"the calibration table is of another contrastive encoder ({table.towers_sha256[:12]}) than this one ({towers_sha256[:12]}), "
            f"though of the same model. {CALIBRATE_AGAIN}"
        )
    expected = calibrated_tensors(config)
    if not has_towers(table):
        expected = {name: channels for name, channels in expected.items() if not name.startswith(OF_TOWERS)}
    elif config.contrastive is None:
        tensors = {name: each for name, each in table.tensors.items() if not name.startswith(OF_TOWERS)}
        table = msgspec.structs.replace(table, tensors=tensors)
    missing = [name for name in expected if name not in table.tensors]
    unknown = [name for name in table.tensors if name not in expected]
    if missing or unknown:
        faults = [
            f"{what} {', '.join(names[:_SHOWN_NAMES])}{f' and {len(names) - _SHOWN_NAMES} more' if len(names) > _SHOWN_NAMES else ''}"
            for what, names in (("it lacks", missing), ("it has unknown", unknown))
            if names
        ]
        raise CalibrationError(f"the calibration table does not fit {config.name}: {'; '.join(faults)}. {CALIBRATE_AGAIN}")
    for name, channels in expected.items():
        found, zero = len(table.tensors[name].channels()), not table.tensors[name].amax
        if zero and found:
            raise CalibrationError(
                f"the calibration table has {found} channels of {name}, of which it says that only zeros were seen; expected no channels "
                f"beside a range of 0. {CALIBRATE_AGAIN}"
            )
        if not zero and found != channels:
            raise CalibrationError(
                f"the calibration table has {found} channels of {name}, expected {channels}. {CALIBRATE_AGAIN}"
            )


def calibration_record(table: CalibrationTable, origin: Literal["given", "shipped"]) -> CalibrationRecord:
    """What a manifest says of a table."""
    return CalibrationRecord(
        origin=origin,
        method=table.method,
        data_sha256=table.data_sha256,
        samples=table.samples,
        tokens=table.tokens,
        images=table.images,
    )


def read_table(path: Path) -> CalibrationTable:
    """The table in a file. Raises CalibrationError if it cannot be read, is of a newer schema or holds invalid numbers."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"calibration table {path} cannot be read: {error.strerror}") from error
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version > SCHEMA_VERSION:
            raise CalibrationError(
                f"calibration table {path} has schema {version}, this version of flamingo-export knows {SCHEMA_VERSION}. "
                "Update flamingo-export, or calibrate again."
            )
        table = msgspec.json.decode(data, type=CalibrationTable)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CalibrationError(f"{path} is not a calibration table: {error}. {CALIBRATE_AGAIN}") from error
    if faults := _faults(table):
        raise CalibrationError(f"calibration table {path}: {'; '.join(faults[:_SHOWN_NAMES])}. {CALIBRATE_AGAIN}")
    return table


def write_table(path: Path, table: CalibrationTable) -> None:
    """Writes a table so that readers see all of it or nothing; equal tables make equal bytes. Raises CalibrationError for bad numbers."""
    if faults := _faults(table):
        raise CalibrationError(f"the calibration table of {table.model} cannot be written: {'; '.join(faults[:_SHOWN_NAMES])}")
    ordered = msgspec.structs.replace(table, tensors=dict(sorted(table.tensors.items())))
    write_atomically(path, msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")


class _Versioned(msgspec.Struct):
    schema_version: int


def _faults(table: CalibrationTable) -> list[str]:
    faults = [
        f"{field} is {value!r}, expected 64 hexadecimal digits"
        for field, value in (
            ("weights_sha256", table.weights_sha256),
            ("data_sha256", table.data_sha256),
            *((("towers_sha256", table.towers_sha256),) if table.towers_sha256 is not None else ()),
        )
        if len(value) != 64 or set(value) - set("0123456789abcdef")
    ]
    counts = {"schema_version": table.schema_version, "samples": table.samples, "tokens": table.tokens, "images": table.images}
    faults += [f"{field} is {count}, expected 1 to 2^63" for field, count in counts.items() if not 1 <= count < 2**63]
    if not table.tensors:
        faults.append("it has no tensors")
    for name, statistics in table.tensors.items():
        values = {method: getattr(statistics, method) for method in METHODS}
        if any(values.values()) and not all(0 < value <= _LARGEST for value in values.values()):
            shown = ", ".join(f"{method} {value}" for method, value in values.items())
            faults.append(f"{name} has {shown}; expected positive numbers within fp32's range, or zeros throughout")
        if not all(value <= statistics.amax for value in values.values()):
            shown = ", ".join(f"{method} {value}" for method, value in values.items())
            faults.append(f"{name} has {shown}; expected none above amax, the largest number that was seen")
        try:
            channels = statistics.channels()
        except ValueError as error:
            faults.append(f"channel_rms of {name} is not base64 of float16 ({error})")
            continue
        if not np.isfinite(channels).all() or (channels < 0).any():
            faults.append(f"channel_rms of {name} holds numbers that are negative or not finite")
    return faults
