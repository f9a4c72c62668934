"""calibrate(): the reference over all samples, one part of the model after the other.

    pixels -- vision_encoder --> features -- resampler --> latents --------------,
    token ids -- language_model --> hidden -- [cross_attention.i] -- language_model.layers.j --> ... -- norm --> input of the head

A part's weights are read once, all samples go through it, and what comes out waits on the disk for the next part. So memory is that of the
largest part and one sample, whatever the model and the data.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flamingo_calibration.data import BadSample, Checked, Sample, check_samples
from flamingo_calibration.states import Array, Shapes, Stream, Work, exclusive, put, settle
from flamingo_calibration.watching import Watch, products
from flamingo_export.backends.memory import release
from flamingo_export.errors import CalibrationError
from flamingo_export.progress import SILENT, Progress
from flamingo_export.quantize.table import SCHEMA_VERSION, CalibrationTable, Method
from flamingo_export.runtime.media import load_medium
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources import WeightSource, tensor_digest
from flamingo_reference.time_weights import time_weights

if TYPE_CHECKING:
    from torch import Tensor

SETTLE_SECONDS = 10.0
"""What may be lost of the vision encoder's work: a small model's media would wait for the disk longer than for the encoder."""
RECIPE = 1
"""Bumped whenever other statistics are found for the same weights and data."""


class _Step(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the model on its way: the stream it writes (None: nothing comes out) with the shapes in it, and what makes one of them."""

    prefix: str
    output: str | None
    shapes: Shapes
    run: Callable[[Any, Watch, int], Any]


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
    of this calibration, where it goes on if it was interrupted; left there, with all that is finished, for the caller to remove once
    the table is safe (None: a temporary one). skip_bad: samples that cannot be used are left out and told of.

    Raises CalibrationError (samples that cannot be used, too few, activations that are constant or not finite, disk full, torch missing).
    """
    if importlib.util.find_spec("torch") is None:
        raise CalibrationError("calibration runs the PyTorch reference. Install it: pip install 'flamingo-export[torch]'")
    checked = check_samples(samples, source, tokenizer, skip_bad=skip_bad, progress=progress)
    if work is not None:
        with exclusive(work):
            try:
                return _Calibration(source, checked, work, progress).run(method)
            except KeyboardInterrupt:
                progress.note(f"stopped; what is finished is kept in {work}, and the same command goes on from there")
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
        self.media = [medium for sample in checked.samples for medium in sample.media]
        self.first_medium = np.cumsum([0, *(len(sample.media) for sample in checked.samples)]).tolist()
        self.read_now: dict[str, str] = {}

    def run(self, method: Method) -> CalibrationTable:
        """All parts that are not finished yet, then the table."""
        steps = list(self._steps())
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
            tensors=dict(sorted(journal.statistics.items())),
        )

    def _open(self, steps: list[_Step]) -> None:
        """Goes on with what an interrupted calibration has finished, if all that the next part needs is there."""
        journal = self.work.journal
        if self.work.discarded:
            self.progress.note(f"the calibration in {self.work.folder} was of other weights, data or versions; starting anew")
        elif journal.parts and all(stream.complete for stream in self._needed(steps, journal.parts)):
            self.progress.note(f"going on with the interrupted calibration: {journal.parts} of {len(steps)} parts are finished")
        elif journal.parts:
            self.progress.note(f"{self.work.folder} is not complete; starting anew")
            self.work.restart(self.identity)

    def _needed(self, steps: list[_Step], number: int) -> list[Stream]:
        """The streams that part `number` and those after it read of the parts before it."""
        written = {step.output: step for step in steps[:number] if step.output is not None}
        wanted = [] if number >= len(steps) else ["features"] if number == 1 else ["latents"]
        hidden = [name for name in written if name.startswith("hidden")]
        wanted += hidden[-1:] if number < len(steps) else []
        return [self.work.stream(name, written[name].shapes) for name in wanted if name in written]

    def _run(self, steps: list[_Step], number: int) -> None:
        """One part on all items."""
        import torch

        from flamingo_reference.parts import load_part

        step, journal = steps[number], self.work.journal
        self.read_now = {}
        module = load_part(self.config, step.prefix, self._read)
        watch = Watch(self.config, step.prefix, module)
        with torch.no_grad():
            if step.output is None:
                for index in range(len(step.shapes)):
                    step.run(module, watch, index)
                    self.progress.advance(1)
            else:
                self._write(step, self.work.stream(step.output, step.shapes), module, watch)
        journal.statistics |= watch.finish()
        del module
        release()
        journal.digests |= self.read_now
        journal.parts, journal.items = number + 1, 0
        self.work.save()
        self.work.keep(self._needed(steps, number + 1))

    def _write(self, step: _Step, stream: Stream, module: Any, watch: Watch) -> None:
        """What a part makes of all items, into its stream. The vision encoder's are journalled now and then, if it has no statistics to lose."""
        journal, within = self.work.journal, step.prefix == "vision_encoder" and not products(self.config, step.prefix)
        if within and journal.items == len(step.shapes) and stream.complete:  # killed before the journal knew of the whole part
            self.progress.advance(journal.items)
            return
        kept = journal.items if within and stream.holds(journal.items) else 0
        self.progress.advance(kept)
        settled = time.monotonic()
        with stream.writing(kept) as file:
            for index in range(kept, len(step.shapes)):
                put(file, step.run(module, watch, index).numpy())
                if within and time.monotonic() - settled >= SETTLE_SECONDS:
                    settle(file)
                    journal.items = index + 1
                    self.work.save()
                    settled = time.monotonic()
                self.progress.advance(1)

    def _read(self, name: str) -> Any:
        array = self.source.read(name)
        if self.source.digested and name not in self.work.journal.digests:
            self.read_now[name] = tensor_digest(array)
        return array

    def _steps(self) -> Iterator[_Step]:
        """The parts in order."""
        config, samples = self.config, self.checked.samples
        frames = [count for sample in samples for count in sample.frames]
        features = [(count, config.vision.num_patches, config.vision.feature_width) for count in frames]
        latents = [(config.resampler.num_latents, config.resampler.width)] * len(frames)
        hidden = [(len(sample.token_ids), config.language_model.width) for sample in samples]
        yield _Step(prefix="vision_encoder", output="features", shapes=features, run=self._encode)
        seen = self.work.stream("features", features)
        yield _Step(prefix="resampler", output="latents", shapes=latents, run=lambda m, _, i: self._resample(m, seen.read(i)))
        known = self.work.stream("latents", latents)
        last = self.work.stream("hidden.0", hidden)
        yield _Step(prefix="language_model", output="hidden.0", shapes=hidden, run=self._embed)
        count = 0
        for layer in range(config.language_model.num_layers):
            if layer in config.gated_layers:
                prefix, name = f"cross_attention.{config.gated_layers.index(layer)}", f"hidden.{(count := count + 1)}"
                yield _Step(prefix=prefix, output=name, shapes=hidden, run=self._gated(last, known))
                last = self.work.stream(name, hidden)
            prefix, name = f"language_model.layers.{layer}", f"hidden.{(count := count + 1)}"
            yield _Step(prefix=prefix, output=name, shapes=hidden, run=self._layer(last))
            last = self.work.stream(name, hidden)
        yield _Step(prefix="language_model", output=None, shapes=hidden, run=self._head(last))

    def _encode(self, module: Any, watch: Watch, index: int) -> Tensor:
        """Features of one medium, frame by frame: an encoder of 320 pixels takes much memory for each."""
        import torch

        pixels = load_medium(self.media[index], self.config, self.source.inputs.fit).pixels
        return torch.cat([module(torch.from_numpy(frame[None])) for frame in pixels])

    def _resample(self, module: Any, features: Array) -> Tensor:
        import torch

        embeddings = self.config.resampler.num_time_embeddings
        times = [torch.from_numpy(time_weights(len(features), embeddings))] if embeddings else []
        latents: Tensor = module(torch.from_numpy(features[None]), *times)[0]
        return latents

    def _embed(self, module: Any, watch: Watch, index: int) -> Tensor:
        import torch

        embedded: Tensor = module.embedding(torch.from_numpy(self.checked.samples[index].token_ids))
        return embedded

    def _gated(self, hidden: Stream, latents: Stream) -> Callable[[Any, Watch, int], Tensor]:
        import torch

        resampler = self.config.resampler

        def run(module: Any, watch: Watch, index: int) -> Tensor:
            sample = self.checked.samples[index]
            shown = np.zeros((len(sample.media), resampler.num_latents, resampler.width), np.float32)
            for place in range(len(sample.media)):
                shown[place] = latents.read(self.first_medium[index] + place)
            k, v = module.media_kv(torch.from_numpy(shown))
            watch.media(k, v)
            rows, phi = torch.arange(len(sample.media))[None], torch.from_numpy(sample.phi[None])
            found: Tensor = module(torch.from_numpy(hidden.read(index)[None]), k, v, rows, phi)[0]
            return found

        return run

    def _layer(self, hidden: Stream) -> Callable[[Any, Watch, int], Tensor]:
        import torch

        def run(module: Any, watch: Watch, index: int) -> Tensor:
            found: Tensor = module(torch.from_numpy(hidden.read(index)[None]))[0]
            return found

        return run

    def _head(self, hidden: Stream) -> Callable[[Any, Watch, int], Tensor]:
        import torch

        def run(module: Any, watch: Watch, index: int) -> Tensor:
            normed: Tensor = module.norm(torch.from_numpy(hidden.read(index)))
            watch.head(normed)
            return normed

        return run
