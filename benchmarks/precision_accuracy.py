"""What each precision costs on the trained nano model: captions, answers, logits and tokens beside fp32's, and bytes.

    python benchmarks/precision_accuracy.py [--items 2000] [--save]
    python benchmarks/precision_accuracy.py --towers [--save]

Held-out scenes, a caption and a question of each, greedily, on ONNX Runtime; every bundle sees the same items. Logits are compared on the
right answers, fed as they are: mean Kullback-Leibler divergence from fp32's, and how often the first choice is the same. --towers: the
contrastive encoder instead, held-out scenes and digits classified without examples, and the smallest cosine to fp32's embeddings.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import msgspec
import numpy as np

from flamingo_export import api
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.pipeline.run import build
from flamingo_export.quantize.policies import preset
from flamingo_export.runtime.contrastive import ContrastiveEncoder
from flamingo_export.sources.choice import source_for_size
from flamingo_export.validate.accuracy import agreement, answers, compared, logits
from flamingo_reference.nano.pictures import Item
from flamingo_reference.nano.tasks import tasks
from flamingo_reference.nano.zero_shot import measured

BUILDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"storage": "fp16"},
    "bf16": {"storage": "bf16"},
    "fp8": {"policy": preset("fp8")},
    "fp8, attention too": {"policy": msgspec.structs.replace(preset("fp8"), name="fp8-attention", attention="fp8")},
    "fp8, media too": {"policy": msgspec.structs.replace(preset("fp8"), name="fp8-media", media="fp8")},
    "fp8, uncalibrated": {"policy": preset("fp8"), "uncalibrated": True},
    "int8": {"policy": preset("int8")},
    "int4": {"policy": preset("int4")},
    "int4, calibrated": {"policy": preset("int4")},
}
LOGIT_ITEMS = 200


TOWERS = ("fp32", "fp16", "fp8", "fp8, uncalibrated", "int8", "int4")


class Embedding:
    """A bundle's towers, as `zero_shot.measured` asks them. Keeps what they gave."""

    def __init__(self, encoder: ContrastiveEncoder) -> None:
        self.encoder = encoder
        self.given: list[Any] = []

    def images(self, items: Sequence[Item]) -> Any:
        """Embeddings [N, J] of items of one frame."""
        self.given.append(self.encoder.embed_images([item.frames[0] for item in items]))
        return self.given[-1]

    def texts(self, texts: Sequence[str]) -> Any:
        """Embeddings [N, J]."""
        self.given.append(self.encoder.embed_texts(list(texts)))
        return self.given[-1]


def towers(save: bool) -> None:
    """Zero-shot tables of nano's towers, as its model card has them, in each precision."""
    exact: list[Any] = []
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TOWERS:
            bundle = Path(folder) / f"{name.replace(' ', '-').replace(',', '')}.bundle"
            build(BuildRequest(source=source_for_size("nano"), out=bundle, parity="skip", **BUILDS[name]))
            with api.load_encoder(bundle, backend="onnxruntime", threads=1) as encoder:
                embedding = Embedding(encoder)
                table = measured(embedding)
            exact = exact or embedding.given
            least = min(
                float((np.asarray(own) * np.asarray(other)).sum(1).min())
                for own, other in zip(embedding.given, exact, strict=True)
            )
            rows[name] = {"least_cosine": least, "table": table.splitlines()}
            print(f"{name}: smallest cosine to fp32's embeddings {least:.5f}\n{table}\n")
    if save:
        print(common.save("precision_towers", rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/precision_accuracy.json")
    parser.add_argument("--towers", action="store_true", help="the contrastive encoder instead of captions and answers")
    arguments = parser.parse_args()
    if arguments.towers:
        towers(arguments.save)
        return
    items = tasks(arguments.items)
    half = arguments.items // 2
    rows: dict[str, dict[str, float]] = {}
    exact_texts: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        table = None
        for name, settings in BUILDS.items():
            if name == "int4, calibrated":
                settings = {**settings, "calibration": table}
            bundle = Path(folder) / f"{name.replace(' ', '-').replace(',', '')}.bundle"
            build(BuildRequest(source=source_for_size("nano"), out=bundle, parity="skip", **settings))
            if name == "fp8":
                table = bundle / "calibration.json"
            manifest = read_manifest(bundle)
            with api.load(bundle, backend="onnxruntime", threads=1) as model:
                texts = answers(model, items)
            numbers = logits(bundle, manifest, get_backend("onnxruntime"), items[:LOGIT_ITEMS])
            if name == "fp32":
                exact_texts, exact = texts, numbers
            outcome, near = compared(items, texts, exact_texts), agreement(exact, numbers)
            decoder = sum(file.size for file in manifest.files if file.path.startswith("weights/decoder"))
            rows[name] = {
                "captions": 100 * outcome.captions / half,
                "answers": 100 * outcome.questions / half,
                "lost_points": outcome.lost_points,
                "equal_texts": 100 * outcome.same / outcome.total,
                "divergence": near.divergence,
                "same_choice": 100 * near.same_choice,
                "decoder_bytes": decoder,
            }
    print(f"{half} captions and {half} answers; logits of {LOGIT_ITEMS} right answers, {near.positions} positions")
    print("| | captions | answers | points lost | equal texts | logit KL, nats | same first choice | decoder |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['captions']:.1f} % | {row['answers']:.1f} % | {row['lost_points']:.2f} | {row['equal_texts']:.1f} % | "
            f"{row['divergence']:.1e} | {row['same_choice']:.2f} % | {row['decoder_bytes'] / 2**20:.1f} MiB |"
        )
    if arguments.save:
        print(common.save("precision_accuracy", {"items": arguments.items, "rows": rows}))


if __name__ == "__main__":
    main()
