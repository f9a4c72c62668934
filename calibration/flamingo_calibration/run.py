"""calibrate(): the reference over all samples, one part of the model after the other (layer_runner.py)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from flamingo_calibration.layer_runner import Step, Walk
from flamingo_calibration.observers import Watch, products
from flamingo_calibration.samples import BadSample, Checked, Sample, check_samples
from flamingo_calibration.streams import Stream, Work, append, exclusive
from flamingo_export.backends.host_memory import release
from flamingo_export.errors import CalibrationError, pip_install
from flamingo_export.files import sync
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources import WeightSource, tensor_digest
from flamingo_export.weights.calibration_table import SCHEMA_VERSION, CalibrationTable, Method

SYNC_SECONDS = 10.0
"""What may be lost of the vision encoder's work: a small model's media would wait for the disk longer than for the encoder."""
RECIPE = 2
"""Bumped whenever other statistics are found for the same weights and data."""


def calibrate(
    source: WeightSource,
    samples: Iterable[Sample | BadSample],
    *,
    tokenizer: Tokenizer | None,
    method: Method = "amax",
    work: Path | None = None,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> CalibrationTable:
    """Statistics of the activations that the fp32 reference has on the samples.

    tokenizer: may be None where prompts are token ids. method: what the table names as its own; all methods are worked out. work: a folder
    of this calibration, where it resumes if it was interrupted; left there, with all that is finished, for the caller to remove once
    the table is safe (None: a temporary one). skip_bad: samples that cannot be used are left out and reported.

    Raises CalibrationError (samples that cannot be used, too few, activations that are constant or not finite, disk full, torch missing).
    """
    if importlib.util.find_spec("torch") is None:
        raise CalibrationError(f"calibration runs the PyTorch reference. Install it: {pip_install('torch')}")
    checked = check_samples(samples, source, tokenizer, skip_bad=skip_bad, progress=progress)
    if work is not None:
        with exclusive(work):
            try:
                return _Calibration(source, checked, work, progress).run(method)
            except KeyboardInterrupt:
                progress.note(f"stopped; what is finished is kept in {work}, and the same command resumes from there")
                raise
    with tempfile.TemporaryDirectory(prefix="flamingo-calibration-") as folder:
        return _Calibration(source, checked, Path(folder), progress).run(method)


class _Calibration:
    def __init__(self, source: WeightSource, checked: Checked, folder: Path, progress: Progress) -> None:
        self.source, self.config, self.checked, self.progress = source, source.config, checked, progress
        versions = [importlib.metadata.version(tool) for tool in ("flamingo-export", "numpy", "torch")]
        settled = [source.identity, source.config, checked.sha256, RECIPE, SCHEMA_VERSION, versions]
        self.identity = hashlib.sha256(msgspec.json.encode(settled)).hexdigest()
        self.work = Work(folder, self.identity)
        self.walk = Walk(source, checked, self.work)
        self.read_now: dict[str, str] = {}

    def run(self, method: Method) -> CalibrationTable:
        """All parts that are not finished yet, then the table."""
        steps = list(self.walk.steps())
        self._open(steps)
        self.progress.stage("calibrating", sum(len(step.shapes) for step in steps))
        for number, step in enumerate(steps):
            if number < self.work.journal.parts:
                self.progress.advance(len(step.shapes))
            else:
                self._run(steps, number)
        journal = self.work.journal
        if silent := [name for name, found in journal.statistics.items() if not found.amax]:
            self.progress.note(f"only zeros were seen in {', '.join(silent)}: any scale is exact for them")
        return CalibrationTable(
            schema_version=SCHEMA_VERSION,
            model=self.config.name,
            weights_sha256=self.source.record(journal.digests).sha256 or "",
            data_sha256=self.checked.sha256,
            method=method,
            samples=len(self.checked.samples),
            tokens=self.checked.num_tokens,
            images=self.checked.num_media,
            towers_sha256=self.source.record(journal.digests).towers_sha256,
            tensors=dict(sorted(journal.statistics.items())),
        )

    def _open(self, steps: list[Step]) -> None:
        """Goes on with what an interrupted calibration has finished, if all that the next part needs is there."""
        journal = self.work.journal
        if self.work.discarded:
            self.progress.note(f"the calibration in {self.work.folder} was of other weights, data or versions; starting anew")
        elif journal.parts and all(stream.complete for stream in self.walk.needed(steps, journal.parts)):
            self.progress.note(f"resuming the interrupted calibration: {journal.parts} of {len(steps)} parts are finished")
        elif journal.parts:
            self.progress.note(f"{self.work.folder} is not complete; starting anew")
            self.work.restart(self.identity)

    def _run(self, steps: list[Step], number: int) -> None:
        """One part on all items."""
        import torch

        from flamingo_reference.model.modules import load_part

        step, journal = steps[number], self.work.journal
        self.read_now = {}
        module = load_part(self.config, step.prefix, self._read, narrow=step.prefix in ("vision_encoder", "language_model"))
        if step.prefix == "contrastive.text":
            self._read("contrastive.logit_scale")  # no part reads it: for the towers' digest
        watch = Watch(self.config, step.prefix, module)
        with torch.no_grad():
            if step.output is None:
                for index in range(len(step.shapes)):
                    step.run(module, index)
                    self.progress.advance(1)
            else:
                self._write(step, self.work.stream(step.output, step.shapes), module)
        journal.statistics |= watch.finish()
        del module
        release()
        journal.digests |= self.read_now
        journal.parts, journal.items = number + 1, 0
        self.work.save()
        self.work.keep(self.walk.needed(steps, number + 1))

    def _write(self, step: Step, stream: Stream, module: Any) -> None:
        """What a part makes of all items, into its stream. The vision encoder's are journalled now and then, if it has no statistics to lose."""
        journal, within = self.work.journal, step.prefix == "vision_encoder" and not products(self.config, step.prefix)
        if within and journal.items == len(step.shapes) and stream.complete:  # killed before the journal knew of the whole part
            self.progress.advance(journal.items)
            return
        kept = journal.items if within and stream.holds(journal.items) else 0
        self.progress.advance(kept)
        synced = time.monotonic()
        with stream.writing(kept) as file:
            for index in range(kept, len(step.shapes)):
                append(file, step.run(module, index).numpy())
                if within and time.monotonic() - synced >= SYNC_SECONDS:
                    sync(file)
                    journal.items = index + 1
                    self.work.save()
                    synced = time.monotonic()
                self.progress.advance(1)

    def _read(self, name: str) -> Any:
        array = self.source.read(name)
        if self.source.digested and name not in self.work.journal.digests:
            self.read_now[name] = tensor_digest(array)
        return array
