"""What evaluation and retrieval cost, each as a ratio within one run.

    python benchmarks/evaluation_cpu.py index [--images 10000]     an index beside the vision encoder's own time
    python benchmarks/evaluation_cpu.py rows [--rows 1000000]      memory of exact search, 1376 wide, as in the paper's joint space
    python benchmarks/evaluation_cpu.py shared [--items 1000]      8 shared shots on a 110M decoder: decoder time beside item by item
    python benchmarks/evaluation_cpu.py original [--items 48]      the same items asked of transformers' IDEFICS, of the size of idefics_cpu.py
    python benchmarks/evaluation_cpu.py video                      decoding a clip's frames beside encoding them

index and video use the nano bundle, whose vision encoder is the smallest there is, so that what surrounds it counts most.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

import flamingo_export
from flamingo_export.evaluation.bundles import BundleModel
from flamingo_export.evaluation.index.exact_search import nearest
from flamingo_export.evaluation.index.similarity import index_of
from flamingo_export.evaluation.index.store import IndexedItem, build_index
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.progress import SILENT
from flamingo_export.runtime.request import Request
from flamingo_export.sources.choice import source_for_size

SIDE = 64


def index(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an index of image files over those of the vision encoder on arrays that lie ready."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(arguments.images):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        items.append(Item(id=str(number), medium=path, answer="x"))
    flamingo_export.build(source_for_size("nano"), out=folder / "nano.bundle", parity="skip")
    with flamingo_export.load(folder / "nano.bundle", threads=arguments.threads) as model:
        evaluated = BundleModel(model)
        started, busy = time.perf_counter(), time.process_time()
        index_of(evaluated, items, folder / "index", progress=SILENT)
        whole, whole_busy = time.perf_counter() - started, time.process_time() - busy
        session = evaluated._encoder._session
        pixels = rng.normal(size=(8, 3, SIDE, SIDE)).astype(np.float32)
        started, busy = time.perf_counter(), time.process_time()
        for _ in range(arguments.images // 8):
            session.run({"pixels": pixels})
        encoder, encoder_busy = time.perf_counter() - started, time.process_time() - busy
    return {
        "images": arguments.images,
        "index_seconds": whole,
        "encoder_seconds": encoder,
        "ratio": whole / encoder,
        "ratio_of_processor_time": whole_busy / encoder_busy,
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
    """Items a second of a bundle and of transformers, 8 shared shots, 3 beams, and answers that differ (random weights have near ties)."""
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
    task = _task(
        _pictures(arguments.items + 64), lambda number: f"w{100 + number} w7 w9 w{number}", lambda number: f"w{number % 7 + 5}"
    )
    settings = Settings(shots=(8,), select="shared", beams=3)
    with flamingo_export.load(built.path, threads=arguments.threads) as model:
        results = {}
        for name, evaluated in (("bundle", BundleModel(model)), ("transformers", TransformersIdefics(checkpoint))):
            started = time.perf_counter()
            flamingo_export.evaluate(evaluated, task, settings=settings, out=folder / name, report=False)
            results[name] = time.perf_counter() - started
        compared = flamingo_export.evaluate(BundleModel(model), task, settings=settings, against=folder / "transformers")
    return {
        "items": arguments.items,
        "seconds": results,
        "times_as_fast": results["transformers"] / results["bundle"],
        "answers_changed": compared.cell(8).changed,
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
        session = BundleModel(model)._encoder._session
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
