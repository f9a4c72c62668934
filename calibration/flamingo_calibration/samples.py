"""Calibration data: prompts with their images, from a file or a program, checked before any of the model is run.

A calibration file is JSON Lines, one sample a line, UTF-8; empty lines are skipped:

    {"prompt": "<image>Output: a red square<EOC><image>Output: two dogs", "images": ["a.jpg", "b.jpg"]}    an <image> for each image
    {"text": "Two dogs on a beach.", "images": ["b.jpg"]}                                                 images shown before the text
    {"prompt": "<image>Output: a ball moves left", "videos": ["clip.gif"]}                                videos in place of images
    {"text": "No image at all."}

Paths are relative to the file's folder. Samples should be what the model will be asked, with the answers it should give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_calibration.tower_texts import tower_texts
from flamingo_export.bundle.bundled_tokenizer import checked_tokenizer, placeholder_tokenizer
from flamingo_export.errors import CalibrationError, InputError, PromptError
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.image_files import refuse_url
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.prompts import each_key_once
from flamingo_export.runtime.request import Request, prepare
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.runtime.videos import Video
from flamingo_export.sources import RandomSource, WeightSource
from flamingo_reference.arrays import Ints
from flamingo_reference.input_format import PAPER, InputFormat

MIN_TOKENS = 256
"""Positions of all samples together, below which statistics are left to chance and calibration is refused."""
_SHOWN_FAULTS = 20
_KEYS = ("prompt", "text", "images", "videos")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with its answer, as text or token ids, and its media. name: where it is from, for messages."""

    prompt: str | Sequence[int]
    media: Sequence[MediumSource] = field(default_factory=list)
    name: str = "a sample"


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """What stands in the place of a sample that cannot be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A sample that was checked: token_ids and phi int64 [S], its media, and the frames of each.

    first: int64 [S] where positions see the media first to phi; else None. rows: of the media bank, of each medium: its tiles, else 1.
    """

    token_ids: Ints
    phi: Ints
    media: tuple[MediumSource, ...]
    frames: tuple[int, ...]
    rows: tuple[int, ...]
    first: Ints | None = None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Samples that can be run. sha256: of token ids and decoded media, in order; skipped: samples that were left out; texts: token ids of
    a text tower, int64 [S] each, where the model has one."""

    samples: tuple[Ready, ...]
    sha256: str
    skipped: int
    texts: tuple[Ints, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def num_media(self) -> int:
        """Media of all samples, each as often as it is shown."""
        return sum(len(sample.media) for sample in self.samples)


def read_samples(path: Path, inputs: InputFormat = PAPER) -> list[Sample | BadSample]:
    """The samples of a calibration file (see above). inputs: a model's tags.

    Raises CalibrationError if the file cannot be read or is empty; lines that cannot be used are returned as such. Images are not opened.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line separators
    except OSError as error:
        raise CalibrationError(f"calibration data {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration data {path} is not UTF-8 text: {error}") from error
    found: list[Sample | BadSample] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name = f"line {number}"
            try:
                found.append(_parse(line, path.parent, name, inputs))
            except InputError as error:
                found.append(BadSample(name=name, reason=str(error)))
    if not found:
        raise CalibrationError(f"calibration data {path} has no lines. {example()}")
    return found


def example() -> str:
    """How a line of a calibration file looks."""
    return 'A line is like {"prompt": "<image>Output: two dogs", "images": ["dogs.jpg"]} (docs/calibration.md).'


def _parse(line: str, folder: Path, name: str, inputs: InputFormat) -> Sample:
    try:
        record = json.loads(line, object_pairs_hook=each_key_once)
    except PromptError:
        raise
    except (RecursionError, ValueError) as error:
        raise PromptError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise PromptError(f"a JSON {type(record).__name__}, expected an object")
    if unknown := sorted(set(record) - set(_KEYS)):
        raise PromptError(f"unknown keys {', '.join(unknown)}; known: {', '.join(_KEYS)}")
    if ("prompt" in record) == ("text" in record):
        raise PromptError("give one of prompt (with an <image> for each image) and text (its images are shown before it)")
    if "images" in record and "videos" in record:
        raise PromptError("both images and videos; give one of them")
    text = record["prompt"] if "prompt" in record else record["text"]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"the text is {json.dumps(text)[:80]}, expected one that is not empty")
    media = _media(record, folder)
    if "text" in record:
        if inputs.tags.image in text:
            raise PromptError(f"a text with the tag {inputs.tags.image}; call it prompt, which places its images")
        text = inputs.tags.image * len(media) + text
    return Sample(prompt=text, media=media, name=name)


def _media(record: dict[str, Any], folder: Path) -> list[MediumSource]:
    key = "videos" if "videos" in record else "images"
    names = record.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise PromptError(f"{key} is {json.dumps(names)[:80]}, expected a list of paths")
    for name in names:
        refuse_url(name)
    return [folder / name if key == "images" else Video(source=folder / name) for name in names]


def source_tokenizer(source: WeightSource) -> Tokenizer | None:
    """What a build of these weights encodes text with: their own tokenizer, bytes for random weights, None where there is neither.

    Raises CheckpointError if the tokenizer does not fit the model.
    """
    from tokenizers import Tokenizer as FastTokenizer

    text = placeholder_tokenizer(source.config) if isinstance(source, RandomSource) else None
    if source.tokenizer is not None:
        text = checked_tokenizer(source.tokenizer, source.config, source.inputs.tags)
    if text is None:
        return None
    tokenizer = FastTokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer, source.config, source.inputs.tags)


def check_samples(
    samples: Iterable[Sample | BadSample],
    source: WeightSource,
    tokenizer: Tokenizer | None,
    *,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> Checked:
    """Encodes the samples and decodes every image once; pixels are not kept.

    Raises CalibrationError naming each sample that cannot be used (unless skip_bad: then each is reported and counted), and if what is
    left has fewer than MIN_TOKENS positions, or no image.
    """
    ready: list[Ready] = []
    prompts: list[str] = []
    faults: list[str] = []
    digest = hashlib.sha256()
    every = list(samples)
    progress.stage("calibration data", len(every))
    for sample in every:
        if isinstance(sample, BadSample):
            faults.append(f"{sample.name}: {sample.reason}")
        else:
            try:
                ready.append(_ready(sample, source, tokenizer, digest))
                prompts += [sample.prompt] if isinstance(sample.prompt, str) else []
            except InputError as error:
                faults.append(f"{sample.name}: {error}")
        progress.advance(1)
    if faults:
        shown = "; ".join(fault.removesuffix(".") for fault in faults[:_SHOWN_FAULTS])
        rest = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        if not skip_bad:
            raise CalibrationError(
                f"{len(faults)} of {len(every)} samples cannot be used: {shown}{rest}. Mend them, or leave them out with --skip-bad."
            )
        progress.note(f"{len(faults)} of {len(every)} samples were left out: {shown}{rest}")
    texts, note = tower_texts(source, prompts)
    if note:
        progress.note(note)
    for ids in texts:
        digest.update(f"text {len(ids)} ".encode() + ids.astype("<i8").tobytes())
    checked = Checked(samples=tuple(ready), sha256=digest.hexdigest(), skipped=len(faults), texts=texts)
    if checked.num_tokens < MIN_TOKENS:
        raise CalibrationError(
            f"{len(ready)} samples with {checked.num_tokens} tokens are too few, at least {MIN_TOKENS} tokens are needed. "
            "Add samples; a few hundred of what the model will be asked are good."
        )
    if not checked.num_media:
        raise CalibrationError(
            f"no sample has an image, so nothing is known of what media look like to the model. Add some that have. {example()}"
        )
    return checked


def _ready(sample: Sample, source: WeightSource, tokenizer: Tokenizer | None, digest: Any) -> Ready:
    request = Request(prompt=sample.prompt, media=sample.media)
    prepared = prepare(request, source.config, tokenizer, fit=source.inputs.fit)
    limit = source.config.language_model.position_limit
    if limit is not None and len(prepared.token_ids) > limit:
        raise PromptError(f"{len(prepared.token_ids)} tokens, the model has {limit} positions. Shorten it.")
    # Each length before what has it, so that no two lists of samples have one digest.
    digest.update(f"{len(prepared.token_ids)} {len(prepared.media)} ".encode())
    digest.update(prepared.token_ids.astype("<i8").tobytes())
    for medium in prepared.media:
        digest.update(medium.digest)
    return Ready(
        token_ids=prepared.token_ids,
        phi=prepared.phi,
        media=tuple(sample.media),
        frames=tuple(len(medium.pixels) for medium in prepared.media),
        rows=tuple(medium.rows for medium in prepared.media),
        first=prepared.first,
    )
