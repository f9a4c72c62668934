"""Activation statistics of the PyTorch reference, for quantisation: prompts and images in, a calibration table out.

    thresholds, activation_statistics    one tensor: counts of magnitudes, and the clipping thresholds that follow
    samples, shipped, texts              samples of a user's file, of the package, of nano's generators; what of them a text tower reads
    observers                            which tensors of a part are looked at, under which names
    streams                              what is carried from part to part, on the disk, so that a killed calibration resumes
    layer_runner                         all samples through one part of the model after the other
    run                                  calibrate(): the layer runner, watched

The table itself, which quantisation reads without any of this, is `flamingo_export.weights.calibration_table`. torch is
imported only inside `run` and `layer_runner`.
"""

from __future__ import annotations

from flamingo_calibration.run import calibrate
from flamingo_calibration.samples import BadSample, Sample, read_samples, source_tokenizer
from flamingo_calibration.shipped import nano_samples, shipped_samples
from flamingo_calibration.streams import discard

__all__ = [
    "BadSample",
    "Sample",
    "calibrate",
    "discard",
    "nano_samples",
    "read_samples",
    "shipped_samples",
    "source_tokenizer",
]
