"""Ranges for a quantised build: what was given is checked before anything is written, what was not is found on the way."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Literal

from flamingo_export.backends.compiler import Compiler
from flamingo_export.bundle.manifest import CalibrationRecord
from flamingo_export.bundle.verify import file_record
from flamingo_export.errors import BuildError, pip_install
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.pipeline.work_folder import BuildPaths, Finished, Journal
from flamingo_export.precision import Precision
from flamingo_export.progress import Progress
from flamingo_export.quantize.policies import check_policy
from flamingo_export.sources import WeightSource
from flamingo_export.weights import Weight, bundle_weights
from flamingo_export.weights.calibration_table import (
    CALIBRATE_AGAIN,
    CALIBRATION_FILE,
    CalibrationTable,
    calibration_record,
    has_towers,
    read_table,
    write_table,
)
from flamingo_export.weights.towers import OF_TOWERS
from flamingo_reference.config import ModelConfig


def checked_policy(
    request: BuildRequest, config: ModelConfig, precision: Precision, compiler: Compiler | None, target: str | None
) -> CalibrationTable | None:
    """The calibration table that was given. compiler: of engines, None where there are none; target: the GPU that they are for.

    Raises BuildError for a policy that fits neither model nor backend, or needs a table and could not be given one; CalibrationError for
    a table that cannot be read.
    """
    policy = precision.policy
    if policy is None:
        if request.calibration is not None:
            raise BuildError("--calibration only applies to quantised builds; add --fp8, --int8 or --int4")
        if request.uncalibrated:
            raise BuildError("--uncalibrated only applies to quantised builds; add --fp8, or leave it out")
        return None
    check_policy(policy, [weight.name for weight in bundle_weights(config, precision) if weight.product])
    if compiler is not None:
        compiler.check_policy(policy, target)
    if request.calibration is not None:
        table = read_table(request.calibration)
        towers = [weight.name for weight in _in_fp8(config, precision) if weight.name.startswith(OF_TOWERS)]
        if towers and not has_towers(table):
            raise BuildError(
                f"policy {policy.name!r} keeps {towers[0]} in fp8, and the table {request.calibration} has no ranges of a contrastive "
                f"encoder: it is of the model without one, or of an earlier version. {CALIBRATE_AGAIN}, or keep image_tower, text_tower and "
                'vision_encoder/readout in "int8" or "storage".'
            )
        return table
    if policy.needs_ranges and not request.uncalibrated and importlib.util.find_spec("torch") is None:
        raise BuildError(
            f"policy {policy.name} quantises activations, whose ranges are found by running the reference, and PyTorch is not installed. "
            f"Give a table made elsewhere (--calibration FILE), install PyTorch ({pip_install('torch')}), or build without "
            "ranges (--uncalibrated), which costs accuracy."
        )
    return None


def _in_fp8(config: ModelConfig, precision: Precision) -> list[Weight]:
    found = [(weight, weight.quantisation(precision)) for weight in bundle_weights(config, precision)]
    return [weight for weight, how in found if how is not None and how.element == "fp8"]


def written_ranges(
    source: WeightSource,
    precision: Precision,
    given: CalibrationTable | None,
    paths: BuildPaths,
    journal: Journal,
    progress: Progress,
    *,
    uncalibrated: bool,
) -> tuple[CalibrationTable | None, CalibrationRecord | None]:
    """The table that quantisation reads, written into the bundle, and what the manifest says of it: as given, or made here of the set
    that ships with the package where activations are quantised."""
    policy, path = precision.policy, paths.work / CALIBRATION_FILE
    if policy is None:
        return None, None
    if given is None and (uncalibrated or not policy.needs_ranges):
        return None, CalibrationRecord(origin="none")
    origin: Literal["given", "shipped"] = "given" if given is not None else "shipped"
    if CALIBRATION_FILE in journal.groups:
        kept = read_table(path)
        return kept, calibration_record(kept, origin)
    table = given
    if table is None:
        from flamingo_calibration.run import calibrate
        from flamingo_calibration.samples import source_tokenizer
        from flamingo_calibration.shipped import shipped_samples

        tokenizer = source_tokenizer(source)
        samples = shipped_samples(source.config, tokenizer, source.inputs)
        table = calibrate(source, samples, tokenizer=tokenizer, work=paths.calibration, progress=progress)
    write_table(path, table)
    journal.add(CALIBRATION_FILE, Finished(file=file_record(paths.work, path), sources={}))
    shutil.rmtree(paths.calibration, ignore_errors=True)
    return table, calibration_record(table, origin)
