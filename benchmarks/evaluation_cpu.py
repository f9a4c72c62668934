"""What evaluation and retrieval cost, each as a ratio within one run.

    python benchmarks/evaluation_cpu.py index [--images 10000] [--size vit]     an index beside the vision encoder's own time
    python benchmarks/evaluation_cpu.py rows [--rows 1000000]      memory of exact search, 1376 wide, as in the paper's joint space
    python benchmarks/evaluation_cpu.py shared [--items 1000]      8 shared shots on a 110M decoder: decoder time beside item by item
    python benchmarks/evaluation_cpu.py original [--items 48]      the same items asked of transformers' IDEFICS, of the size of idefics_cpu.py
    python benchmarks/evaluation_cpu.py video                      decoding a clip's frames beside encoding them

index and video use the nano bundle, whose vision encoder is the smallest there is, so that what surrounds it counts most; index --size vit
takes a ViT-B/16 of random numbers and photographs' sizes instead.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import common
import msgspec
import numpy as np
from PIL import Image

import flamingo_export
from flamingo_export.backends.base import SessionOptions
from flamingo_export.evaluation.bundles import BundleModel
from flamingo_export.evaluation.index.exact_search import nearest
from flamingo_export.evaluation.index.similarity import index_of
from flamingo_export.evaluation.index.store import IndexedItem, build_index
from flamingo_export.evaluation.protocol import Answer, EvaluatedModel
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.progress import SILENT
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.request import Request
from flamingo_export.sources.choice import RandomWeights, source_for_size
from flamingo_reference.config import SIZES, ViTConfig

SIDE = 64


VIT = ViTConfig(patch_size=16, image_size=224, width=768, num_layers=12, num_heads=12, ffw_width=3072)
"""CLIP's ViT-B/16."""


def index(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an index of image files over those of the vision encoder on arrays that lie ready, in turns: of a session with all
    threads, which is what a caller of the graph has, and of the index's own encoder, copies and all."""
    rng = np.random.default_rng(0)
    side, suffix = (SIDE, "png") if arguments.size == "nano" else (480, "jpg")
    items = []
    for number in range(arguments.images):
        path = folder / f"{number}.{suffix}"
        if suffix == "png":
            drawn = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        else:
            drawn = np.asarray(Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((640, side)))
        Image.fromarray(drawn).save(path)
        items.append(Item(id=str(number), medium=path, answer="x"))
    bundle = folder / "index.bundle"
    if arguments.size == "nano":
        flamingo_export.build(source_for_size("nano"), out=bundle, parity="skip")
    else:
        config = msgspec.structs.replace(SIZES["nano"], name="vit-b-16", vision=VIT, contrastive=None)
        flamingo_export.build(RandomWeights(config=config), out=bundle, storage="fp32", parity="skip")
    times: dict[str, list[tuple[float, float]]] = {"index": [], "session": [], "encoder": []}
    with flamingo_export.load(bundle, threads=arguments.threads) as model:
        evaluated = BundleModel(model)
        encoder = evaluated._encoder
        options = SessionOptions(threads=arguments.threads)
        session = model.backend.open(bundle, model.manifest, model.manifest.graph("vision_encoder"), options)
        output = "features" if model.config.contrastive is None else "pooled"
        frame = rng.normal(size=(1, 3, model.config.vision.image_size, model.config.vision.image_size)).astype(np.float32)
        ready = Medium(pixels=frame, digest=b"")
        pixels = np.repeat(frame, 8, axis=0)
        part = arguments.images // arguments.turns

        def timed(name: str, work: Callable[[], object]) -> None:
            started, busy = time.perf_counter(), time.process_time()
            work()
            times[name].append((time.perf_counter() - started, time.process_time() - busy))

        for turn in range(arguments.turns):
            some = items[turn * part : (turn + 1) * part]
            timed("session", lambda: [session.run({"pixels": pixels}, (output,)) for _ in range(part // 8)])
            with mock.patch.object(encoder, "_loaded", return_value=ready):
                timed("encoder", lambda some=some: encoder.encode([item.medium for item in some]))  # type: ignore[misc]
            timed("index", lambda some=some, turn=turn: index_of(evaluated, some, folder / f"index{turn}", progress=SILENT))  # type: ignore[misc]
    wall = {name: sum(each[0] for each in found) for name, found in times.items()}
    busy = {name: sum(each[1] for each in found) for name, found in times.items()}
    return {
        "size": arguments.size,
        "images": part * arguments.turns,
        "copies": encoder.copies,
        "seconds": wall,
        "processor_seconds": busy,
        "ratio_to_a_session_with_all_threads": wall["index"] / wall["session"],
        "its_processor_time": busy["index"] / busy["session"],
        "ratio_to_the_index_encoder": wall["index"] / wall["encoder"],
        "its_processor_time_too": busy["index"] / busy["encoder"],
    }


def rows(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of building and searching an index of random rows."""
    width = 1376

    def encode(places: Sequence[int]) -> Any:
        yield from np.random.default_rng(places[0]).normal(size=(len(places), width)).astype(np.float32)

    items = [IndexedItem(id=str(number)) for number in range(arguments.rows)]
    made = build_index(folder / "index", items, encode, bundle="", features="random")
    queries = np.random.default_rng(1).normal(size=(16, width)).astype(np.float32)
    started = time.perf_counter()
    found, _ = nearest(made, queries, 32)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert found.shape == (16, 32)
    return {"rows": arguments.rows, "width": width, "peak_gib": peak / 2**30, "seconds_of_16_queries": seconds}


class Timed(BundleModel):
    """Adds up the time of generation, nearly all of which is the decoder's: the vision encoder of this size does not count."""

    decoder = 0.0

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[Answer]:
        """As the bundle does."""
        started = time.perf_counter()
        found = super().generate(requests, beams=beams, max_new_tokens=max_new_tokens)
        self.decoder += time.perf_counter() - started
        return found


def _pictures(count: int) -> Any:
    return np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)


def _task(pictures: Any, question: Callable[[int], str], answer: Callable[[int], str]) -> Task:
    """Questions about pictures, the first 64 of which are the examples."""
    items = tuple(
        Item(id=str(number), medium=picture, answer=answer(number), references=("x",), question=question(number))
        for number, picture in enumerate(pictures)
    )
    return Task(
        name="made",
        title="made",
        form="question",
        mode="open",
        metric="exact",
        read=lambda _, split: Split(items=items[:64] if split == "train" else items[64:]),
        files="",
        needs_data=False,
        max_new_tokens=5,
    )


def shared(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decoder and whole seconds an item: 8 shots that all items share, in batches, beside 8 of its own for each item, one by one."""
    config = common.model_config("decoder-110m", layers=12, width=768, heads=12, every=4)
    path = common.bundle(config, folder)
    task = _task(_pictures(arguments.items + 64), lambda number: f"What is it, {number}?", lambda number: f"shape {number % 7}")
    found = {}
    for name, select, batch in (("shared", "shared", 8), ("alone", "random", 1)):
        with flamingo_export.load(path, threads=arguments.threads) as model:
            timed = Timed(model, batch_size=batch)
            settings = Settings(shots=(8,), select=select, beams=3)  # type: ignore[arg-type]
            started = time.perf_counter()
            flamingo_export.evaluate(timed, task, settings=settings)
            whole = time.perf_counter() - started
            found[name] = {"decoder": timed.decoder / arguments.items, "whole": whole / arguments.items}
    ratio = found["alone"]["decoder"] / found["shared"]["decoder"]
    return {
        "items": arguments.items,
        **found,
        "decoder_ratio": ratio,
        "whole_ratio": found["alone"]["whole"] / found["shared"]["whole"],
    }


def original(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Items a second of a bundle and of transformers, in turns, 8 shared shots, 3 beams, and answers that differ (random weights have near
    ties)."""
    import idefics_cpu
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from flamingo_export.evaluation.transformers_idefics import TransformersIdefics

    torch.set_num_threads(arguments.threads)
    checkpoint = folder / "idefics"
    idefics_cpu.idefics().save_pretrained(checkpoint)
    special = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]
    words = [*special[:3], *(f"w{number}" for number in range(3, idefics_cpu.VOCABULARY)), *special[3:]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    built = flamingo_export.build(checkpoint, out=folder / "i.bundle", storage="fp32", parity="skip")
    settings = Settings(shots=(8,), select="shared", beams=3)
    results = {"bundle": [0.0, 0.0], "transformers": [0.0, 0.0]}
    part, changed = arguments.items // arguments.turns, 0
    pictures = _pictures(arguments.items + 64)
    with flamingo_export.load(built.path, threads=arguments.threads) as model:
        evaluated: dict[str, EvaluatedModel] = {"bundle": BundleModel(model), "transformers": TransformersIdefics(checkpoint)}
        for turn in range(arguments.turns):
            first = 64 + turn * part
            task = _task(
                np.concatenate([pictures[:64], pictures[first : first + part]]),
                lambda number: f"w{100 + number} w7 w9 w{number}",
                lambda number: f"w{number % 7 + 5}",
            )
            for name in list(results)[:: -1 if turn % 2 else 1]:
                started, busy = time.perf_counter(), time.process_time()
                out = folder / f"{name}{turn}"
                flamingo_export.evaluate(evaluated[name], task, settings=settings, out=out, report=False)
                results[name][0] += time.perf_counter() - started
                results[name][1] += time.process_time() - busy
            against = folder / f"transformers{turn}"
            changed += (
                flamingo_export.evaluate(evaluated["bundle"], task, settings=settings, against=against).cell(8).changed or 0
            )
    return {
        "items": part * arguments.turns,
        "seconds": {name: found[0] for name, found in results.items()},
        "processor_seconds": {name: found[1] for name, found in results.items()},
        "times_as_fast": results["transformers"][0] / results["bundle"][0],
        "times_less_processor_time": results["transformers"][1] / results["bundle"][1],
        "answers_changed": changed,
    }


def video(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to decode 30 frames at 3 a second of a 10 s clip of 640x360, and to encode them."""
    import av

    from flamingo_export.runtime.media import load_medium
    from flamingo_export.runtime.videos import Video, load_video

    path = folder / "clip.mp4"
    rng = np.random.default_rng(0)
    ground = np.asarray(Image.fromarray(rng.integers(0, 255, (23, 40, 3), dtype=np.uint8)).resize((704, 400)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(250):
            shift = number % 40
            frame = np.ascontiguousarray(ground[shift : shift + 360, shift : shift + 640])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    flamingo_export.build(source_for_size("nano"), out=folder / "nano.bundle", parity="skip")
    clip = Video(source=path, fps=3, num_frames=30)
    with flamingo_export.load(folder / "nano.bundle", threads=arguments.threads) as model:
        pixels = load_medium(clip, model.config, model.inputs.fit).pixels
        session = model.engines.vision_encoder
        times = common.interleaved(
            {
                "decode": lambda: list(load_video(clip, default_frames=30)),
                "encode": lambda: [session.run({"pixels": pixels[start : start + 8]}) for start in range(0, 30, 8)],
            },
            rounds=arguments.rounds,
        )
    return {"frames": len(pixels), **times, "decode_over_encode_nano": times["decode"] / times["encode"]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("index", "rows", "shared", "original", "video"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", choices=("nano", "vit"), default="nano", help="of the index's encoder")
    parser.add_argument("--turns", type=int, default=5, help="in which index and original are interleaved")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/evaluation_WHAT.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"index": index, "rows": rows, "shared": shared, "original": original, "video": video}[arguments.what](
            Path(folder), arguments
        )
    for name, value in found.items():
        print(f"{name}: {value}")
    if arguments.save:
        print(common.save(f"evaluation_{arguments.what}", found))


if __name__ == "__main__":
    main()
