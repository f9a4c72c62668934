"""Nano end to end in a device's memory: PyTorch and the phi kernel compute the graphs, everything else is what runs TensorRT's engines.

In fp32 the whole of parity must pass, token traces included, and batches, streams, samples and scores must be what the same loop gives on the
PyTorch reference. In 16 bits the rule is the kernels': log-probabilities are at most twice as far from fp32's as those of the same graphs
without the kernel, in the same type, plus one rounding unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import flamingo_export
from flamingo_export.backends.base import Backend, SessionOptions
from flamingo_export.backends.reference import ReferenceBackend
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.precision import StorageType
from flamingo_export.quantize.policies import read_policy
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_export.validate import check_bundle
from flamingo_reference.nano.tasks import Task, read_answers, tasks
from gpu.torch_backend import Card, TorchBackend
from gpu.torch_graph import Attend

MEDIA_POLICY = Path(__file__).with_name("fp8_bank.toml")
"""The bank in FP8 and nothing else: matrices in FP8 are for compilers."""
LIMITS = ShapeLimits(max_length=512, chunk=64, batch=8, beams=4)
STEP = {"fp16": 2.0**-11, "bf16": 2.0**-8}
NEW_TOKENS = 12


def build_bundles(folder: Path) -> dict[str, Path]:
    """Nano's trained weights in each type, and with the media bank in FP8."""
    from flamingo_export.sources.choice import source_for_size

    made: dict[str, Path] = {}
    settings: dict[str, dict[str, Any]] = {
        "fp32": {"storage": "fp32"},
        "fp16": {"storage": "fp16"},
        "bf16": {"storage": "bf16"},
        "fp16, media in FP8": {"storage": "fp16", "policy": read_policy(MEDIA_POLICY), "uncalibrated": True},
    }
    for name, chosen in settings.items():
        made[name] = folder / f"{len(made)}.bundle"
        flamingo_export.build(source_for_size("nano"), out=made[name], limits=LIMITS, parity="skip", **chosen)
    return made


def questions(count: int) -> list[Request]:
    """Requests of one image, of two, and of none, of different lengths."""
    items = tasks(count + 1)
    found = []
    for index in range(count):
        task, other = items[index], items[index + 1]
        prompt = f"<image>{task.asked}"
        if index % 3 == 1:
            prompt = f"<image>{other.asked} {other.expected}<EOC>{prompt}"
            found.append(Request(prompt=prompt, media=[other.frame, task.frame]))
        else:
            found.append(Request(prompt=prompt, media=[task.frame]))
    return found


def generations(model: Model) -> dict[str, Any]:
    """Tokens and log-probabilities of everything that the loop can be asked for."""
    asked = questions(10)
    found: dict[str, Any] = {}

    def keep(name: str, results: list[Any]) -> None:
        for index, result in enumerate(results):
            texts = [result, *result.alternatives]
            found[f"{name} {index}"] = ([text.token_ids for text in texts], [text.token_logprobs for text in texts])

    keep("batches, greedy", model.generate(asked, beams=1, max_new_tokens=NEW_TOKENS, batch_size=4))
    keep("batches of beams", model.generate(asked, beams=3, num_return=3, max_new_tokens=NEW_TOKENS, batch_size=3))
    keep("wider than the engine's candidates", model.generate(asked[:2], beams=6, max_new_tokens=6, batch_size=1))
    keep("samples", model.generate(asked[:3], temperature=0.8, top_p=0.9, seed=1, num_return=2, max_new_tokens=NEW_TOKENS))
    stream = model.stream(asked[1], beams=1, max_new_tokens=NEW_TOKENS)
    pieces = list(stream)
    assert stream.result is not None
    assert "".join(pieces).strip() == stream.result.text, f"the stream gave {pieces}, its result is {stream.result.text!r}"
    keep("stream", [stream.result])
    scores = model.score(asked[1], [task.expected for task in tasks(6)])
    found["scores"] = ([], [score.token_logprobs for score in scores])
    return found


def compare_generations(found: Mapping[str, Any], right: Mapping[str, Any], tolerance: float = 2e-4) -> list[str]:
    """Where tokens differ, or log-probabilities by more than fp32's rounding through the model."""
    faults = []
    for name, (tokens, logprobs) in right.items():
        if found[name][0] != tokens:
            faults.append(f"{name}: tokens {found[name][0]}, the reference has {tokens}")
            continue
        for mine, theirs in zip(found[name][1], logprobs, strict=True):
            worst = float(np.abs(np.subtract(mine, theirs)).max(initial=0.0))
            if not worst <= tolerance:
                faults.append(f"{name}: a log-probability is off by {worst:.2g}")
    return faults


def open_model(bundle: Path, backend: Backend) -> Model:
    return Model(bundle, read_manifest(bundle), backend, SessionOptions(threads=1))


def scores_of(bundle: Path, backend: Backend, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-probabilities of the right and of two wrong answers to questions, token by token."""
    found: list[float] = []
    items: list[Task] = tasks(count + 2)
    with open_model(bundle, backend) as model:
        for index, request in enumerate(questions(count)):
            answers = [items[index + step].expected for step in range(3)]
            for score in model.score(request, answers):
                found += score.token_logprobs
    return np.array(found)


def answers_of(bundle: Path, backend: Backend, count: int) -> dict[str, int]:
    """Answers to held-out tasks: how many are right, and how many are what the reference said when it was recorded, in fp32."""
    items, expected = tasks(count), read_answers().said
    requests = [Request(prompt=f"<image>{task.asked}", media=[task.frame]) for task in items]
    with open_model(bundle, backend) as model:
        texts = [result.text for result in model.generate(requests, beams=1, max_new_tokens=24, batch_size=LIMITS.batch)]
    return {
        "tasks": count,
        "right": sum(text == task.expected for text, task in zip(texts, items, strict=True)),
        "as_recorded": sum(text == recorded for text, recorded in zip(texts, expected, strict=False)),
    }


def run(card: Card, attend: Attend, bundles: Mapping[str, Path], *, count: int = 32) -> dict[str, Any]:
    """Every check. attend: the phi kernel. count: questions that are scored and answered."""
    result: dict[str, Any] = {}
    report = check_bundle(bundles["fp32"], backend=TorchBackend(card))  # type: ignore[arg-type]
    rows = [f"{row.case}, {row.tensor}: {row.error} of {row.limit}. {row.note}" for row in report.rows if not row.passed]
    result["parity in fp32, the graphs' own operators"] = {"cases": len(report.rows), "failures": rows[:10]}
    backend = TorchBackend(card, attend)
    with open_model(bundles["fp32"], backend) as model:  # type: ignore[arg-type]
        found = generations(model)
        captured = _captured(backend)
    with open_model(bundles["fp32"], ReferenceBackend()) as model:
        right = generations(model)
    result["generation in fp32, the kernel"] = {
        "cases": len(right),
        "failures": compare_generations(found, right),
        "steps_captured": captured,
    }
    truth = scores_of(bundles["fp32"], TorchBackend(card), count)  # type: ignore[arg-type]
    for name, bundle in bundles.items():
        storage: StorageType = read_manifest(bundle).precision.storage
        if storage == "fp32":
            continue
        ours, plain = (scores_of(bundle, TorchBackend(card, how), count) for how in (attend, None))  # type: ignore[arg-type]
        error, usual = np.abs(ours - truth), np.abs(plain - truth)
        floor = STEP[storage] * float(np.abs(truth).max())
        entry: dict[str, Any] = {
            "cases": len(truth),
            "greatest_error": float(error.max()),
            "greatest_error_without_the_kernel": float(usual.max()),
            "answers": answers_of(bundle, TorchBackend(card, attend), count),  # type: ignore[arg-type]
            "failures": [],
        }
        for what, mine, theirs in (
            ("greatest", error.max(), usual.max()),
            ("rms", np.sqrt(np.square(error).mean()), np.sqrt(np.square(usual).mean())),
        ):
            if not mine <= 2 * theirs + floor:
                entry["failures"].append(f"{name}: {what} error {mine:.3g}, without the kernel {theirs:.3g}, floor {floor:.3g}")
        result[f"scores in {name}"] = entry
    return result


def _captured(backend: TorchBackend) -> bool:
    """Whether the decoder's steps became CUDA graphs. PyTorch may refuse; TensorRT's engines are captured by the same code."""
    return any(session._steps for session in backend.sessions)
