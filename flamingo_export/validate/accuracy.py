"""What a precision costs in what a user sees: captions and answers of a nano bundle, and how far its logits are from another's.

    python -m flamingo_export.validate.accuracy      records what the reference says (nano/answers.json); needs torch

Right is what is expected to the letter. Pairs are compared: the same items, one bundle beside another, so that what both get wrong does
not blur the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.backends.base import Backend, SessionOptions
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.progress import SILENT, Progress
from flamingo_export.validate.checks.case_runs import opened, run_stage
from flamingo_export.validate.expected.cases import DecoderCase, Request
from flamingo_export.validate.expected.decoder_calls import plan_case
from flamingo_export.validate.expected.media_rounding import MediaFormat
from flamingo_export.validate.expected.oracle import resampler_feeds
from flamingo_export.validate.report.parity_report import Row
from flamingo_export.validate.tolerances import coarsest
from flamingo_export.weights.calibration_table import CALIBRATION_FILE, read_table
from flamingo_reference.nano.tasks import ANSWERS, COUNT, Answers, Task, read_answers, tasks

if TYPE_CHECKING:
    from flamingo_export.runtime.model import Model

MAX_NEW_TOKENS = 24
BATCH = 32


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Right answers of this bundle, and of what it is compared with, to the same items; `same` of them are equal texts."""

    captions: int
    questions: int
    compared_captions: int
    compared_questions: int
    same: int
    total: int
    """Captions and questions, as many of each."""

    @property
    def lost_points(self) -> float:
        """Percentage points by which this bundle is behind."""
        return 100 * (self.compared_captions + self.compared_questions - self.captions - self.questions) / self.total


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Logits of a bundle beside another's on the same texts: mean Kullback-Leibler divergence in nats, share of equal first choices."""

    divergence: float
    same_choice: float
    positions: int


def answers(model: Model, items: Sequence[Task], progress: Progress = SILENT) -> list[str]:
    """What a bundle says to each item, greedily."""
    from flamingo_export.runtime.request import Request as Prompt

    texts: list[str] = []
    progress.stage("tasks", len(items))
    for start in range(0, len(items), BATCH):
        prompts = [Prompt(prompt=f"<image>{item.asked}", media=[item.frame]) for item in items[start : start + BATCH]]
        found = model.generate(prompts, batch_size=BATCH, beams=1, max_new_tokens=MAX_NEW_TOKENS)
        texts += [each.text for each in found]
        progress.advance(len(prompts))
    return texts


def compared(items: Sequence[Task], texts: Sequence[str], others: Sequence[str]) -> Accuracy:
    """One list of answers beside another. Raises ValueError if they are not to the same items."""

    def right(texts: Sequence[str], kind: str) -> int:
        return sum(text == item.expected for text, item in zip(texts, items, strict=True) if item.kind == kind)

    return Accuracy(
        captions=right(texts, "caption"),
        questions=right(texts, "question"),
        compared_captions=right(others, "caption"),
        compared_questions=right(others, "question"),
        same=sum(one == other for one, other in zip(texts, others, strict=True)),
        total=len(items),
    )


LOST_POINTS = {"int8": 1.0, "fp8": 1.0, "int4": 3.0}
"""Most percentage points that a policy of this coarsest format may lose against the reference. Goals of the project, not measurements."""


def accuracy_row(bundle: Path, manifest: Manifest, backend: Backend, options: SessionOptions, progress: Progress) -> Row | None:
    """The gate of a quantised bundle of the shipped nano checkpoint: right answers beside the reference's; None for other bundles."""
    from flamingo_export.runtime.model import Model

    limit = LOST_POINTS.get(coarsest(manifest.precision) or "")
    recorded = recorded_answers(manifest)
    if limit is None or recorded is None:
        return None
    items = tasks(len(recorded.said))
    with Model(bundle, manifest, backend, options) as model:
        found = compared(items, answers(model, items, progress), recorded.said)
    half = found.total // 2
    return Row(
        level="task",
        case="captions and questions",
        subgraph="runtime",
        tensor="percentage points lost",
        error=found.lost_points,
        limit=limit,
        passed=found.lost_points <= limit,
        note=f"captions {found.captions} of {half} (reference {found.compared_captions}), "
        f"answers {found.questions} of {half} (reference {found.compared_questions}), {found.same} of {found.total} texts equal",
    )


def recorded_answers(manifest: Manifest) -> Answers | None:
    """The reference's answers, if the bundle is of the shipped nano checkpoint."""
    if manifest.config.name != "nano" or not ANSWERS.is_file():
        return None
    found = read_answers()
    return found if found.weights_sha256 == manifest.source.sha256 else None


def logits(
    bundle: Path, manifest: Manifest, backend: Backend, items: Sequence[Task], *, options: SessionOptions | None = None
) -> npt.NDArray[np.float32]:
    """Logits [positions, V] that the tokens of every right answer are chosen from, the answers before them being fed, item after item."""
    from flamingo_export.runtime.media import medium_of
    from flamingo_export.runtime.tokenizer import Tokenizer

    config, options = manifest.config, options or SessionOptions(threads=1)
    tokenizer = Tokenizer.open(bundle, config, manifest.inputs.tags)
    asked = [len(tokenizer.encode(f"<image>{item.asked}")) for item in items]
    sequences = [tuple(tokenizer.encode(f"<image>{item.asked} {item.expected}")) for item in items]
    pixels = np.concatenate([medium_of([item.frame], config).pixels for item in items])

    def run(name: str, feeds: dict[str, Any]) -> dict[str, Any]:
        with opened(backend, bundle, manifest, manifest.graph(name), options) as session:
            return session.run(feeds)

    features = run("vision_encoder", {"pixels": pixels})["features"]
    latents = run("resampler", resampler_feeds(config, features[:, None]))["latents"]
    encoded = run("media_kv", {"latents": latents})
    requests = tuple(Request(tokens=tokens, media=(index,), prompt=len(tokens)) for index, tokens in enumerate(sequences))
    case = DecoderCase(name="tasks", requests=requests, bank_rows=len(items))
    plan = plan_case(config, case)
    hidden = None

    table = read_table(bundle / CALIBRATION_FILE) if (bundle / CALIBRATION_FILE).is_file() else None
    media = MediaFormat(manifest.precision, table)

    def bank(i: int) -> tuple[Any, Any]:
        k, v = (media.numbers(name, encoded[name]) for name in (f"media_k.{i}", f"media_v.{i}"))
        return k, v

    for record, layers in manifest.decoder_graphs():
        with opened(backend, bundle, manifest, record, options) as session:
            hidden = run_stage(session, config, plan, media, bank, layers=layers, hidden=hidden).output
    assert hidden is not None
    return np.concatenate([hidden[index][start - 1 : -1] for index, start in enumerate(asked)])


def agreement(exact: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> Agreement:
    """How far logits `found` [positions, V] are from `exact`."""
    first, second = (_log_softmax(values.astype(np.float64)) for values in (exact, found))
    divergence = (np.exp(first) * (first - second)).sum(axis=-1)
    same = first.argmax(axis=-1) == second.argmax(axis=-1)
    return Agreement(divergence=float(divergence.mean()), same_choice=float(same.mean()), positions=len(exact))


def _log_softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = values - values.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def record() -> Answers:
    """What the reference says, in PyTorch, written where bundles are compared with it."""
    from flamingo_export.sources import CheckpointSource
    from flamingo_export.sources.choice import nano_checkpoint
    from flamingo_export.sources.origin import source_digest
    from flamingo_reference.model import Flamingo
    from flamingo_reference.nano import pages
    from flamingo_reference.nano.evaluate import Reader
    from flamingo_reference.nano.pictures import Item
    from flamingo_reference.nano.train_tokenizer import load_tokenizer

    items = tasks(COUNT)
    shown = [
        Item(frames=(item.frame,), caption="", description="", questions=(), formats={}, kind="scene", num_objects=0)
        for item in items
    ]
    folder = nano_checkpoint()
    reader = Reader(Flamingo.from_checkpoint(folder), load_tokenizer(folder / "tokenizer" / "tokenizer.json"), shown)
    texts = reader.ask([[pages.Piece(index, item.asked, "")] for index, item in enumerate(items)])
    found = Answers(weights_sha256=source_digest(CheckpointSource(folder)), said=texts)
    ANSWERS.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return found


if __name__ == "__main__":
    recorded = record()
    outcome = compared(tasks(COUNT), recorded.said, recorded.said)
    print(f"{outcome.captions} captions and {outcome.questions} answers of {outcome.total // 2} each are right")
