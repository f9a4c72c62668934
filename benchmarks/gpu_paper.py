"""What a decoding step must read, on paper: bytes by rows, lengths and beams, and the milliseconds that a card's bandwidth makes of them.

    python benchmarks/gpu_paper.py [--size 9b] [--precision bf16|fp8] [--max-length 4096] [--json]

An engine reads its weights once a step, whatever the batch; of each row the slots that its attentions read, keys and values of every layer; and
of each row the keys and values of one medium, or of an image of as many tiles as can be, in every gated layer. Attentions that know the
slots in use read these (TensorRT for RTX, TensorRT 11), others the whole capacity. Media are read where they lie by the plugin; without it a
step copies them first: read, written, read again. Beams share their row's slots and medium, and add the slots that they wrote. The last
column is what the host sends: small feeds in places of 256 bytes, and of mask and key positions at most what a step can change, beside
all of them, as they are sent before a step is captured.
Bandwidths are data sheets' times what copies reach of them; no card has confirmed it (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "reference")]

from flamingo_export import estimates  # noqa: E402
from flamingo_export.backends.tensorrt.device_memory import ALIGNMENT  # noqa: E402
from flamingo_export.precision import BYTES_PER_WEIGHT, Precision  # noqa: E402
from flamingo_export.quantize.policies import preset  # noqa: E402
from flamingo_export.weights import bundle_weights, stored_bytes  # noqa: E402
from flamingo_reference.config import SIZES, ModelConfig  # noqa: E402

CARDS = {"H200": (4.8e12, 141e9), "L4": (0.3e12, 24e9), "RTX 4090": (1.008e12, 24e9), "Jetson AGX Thor": (0.273e12, 128e9)}
"""Bytes a second and bytes of memory, by the vendor's data sheets."""
REACHED = 0.9
"""Share of it that a copy reaches: 4.3 of 4.8 TB/s on an H200."""
BATCHES, LENGTHS, BEAMS = (1, 8, 64), (256, 1024, 4096), (1, 3)


@dataclass(frozen=True)
class Step:
    """Bytes that one decoding step reads: rows requests side by side, `length` slots in use in each, of `capacity`."""

    rows: int
    length: int
    beams: int
    weights: int
    caches: int
    caches_without_lengths: int
    media: int
    media_without_plugin: int
    sent: int
    sent_whole: int

    def fits(self, memory: float) -> bool:
        """Whether weights and caches of the whole capacity lie in a card's memory."""
        return self.weights + self.caches_without_lengths + self.media < 0.92 * memory

    def milliseconds(self, bandwidth: float, *, lengths: bool) -> float:
        """At a bandwidth in bytes per second."""
        caches = self.caches if lengths else self.caches_without_lengths
        return (self.weights + caches + self.media) / bandwidth * 1e3


def step(config: ModelConfig, precision: Precision, *, rows: int, length: int, beams: int, capacity: int) -> Step:
    """The step that writes the last of `length` tokens of each row; the beams' own tokens are the last tenth of them."""
    lm = config.language_model
    width = BYTES_PER_WEIGHT[precision.storage]
    slot = int(2 * lm.num_layers * lm.kv_heads * lm.head_size * width)
    weights = sum(
        stored_bytes(weight, precision)
        for weight in bundle_weights(config, precision)
        if weight.name.split("/", 1)[0] == "decoder" and (weight.name != "decoder/embedding" or lm.tied_head)
    )
    generated = length // 10
    used = min(capacity, length - generated + beams * generated)
    tiles = config.tiled.max_tiles if config.tiled is not None else 1
    media = estimates.media_bytes(config, rows=rows * tiles, width=1) * (1 if precision.media == "fp8" else width)
    return Step(
        rows=rows,
        length=length,
        beams=beams,
        weights=weights,
        caches=rows * used * slot,
        caches_without_lengths=rows * capacity * slot,
        media=int(media),
        media_without_plugin=int(3 * media),
        sent=sent_bytes(config, rows=rows, beams=beams),
        sent_whole=sent_whole(config, rows=rows, beams=beams, capacity=capacity),
    )


def small_feeds(config: ModelConfig, *, rows: int, beams: int) -> list[int]:
    """Bytes of each input of a step that is sent whole: tokens, positions, phi, logit positions (and first media) by branch; media and write
    index by row."""
    branch, row = 8 * rows * beams, 8 * rows
    media = row * (config.tiled.max_tiles if config.tiled is not None else 1)
    return [branch] * (5 if config.sees_groups else 4) + [media, row]


def sent_bytes(config: ModelConfig, *, rows: int, beams: int) -> int:
    """At most, of a captured step: 16 for each eight bytes that differ. A greedy branch adds its own slot, and its token passes on the device;
    beams add their slots and positions, and see what their parents saw."""
    words = 2 if beams == 1 else 2 * beams + 2 * beams * beams
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in small_feeds(config, rows=rows, beams=beams)) + 16 * words * rows


def sent_whole(config: ModelConfig, *, rows: int, beams: int, capacity: int) -> int:
    """Of a step whose mask and key positions go whole."""
    keys = 8 * rows * capacity if config.language_model.uses_distances else 0
    return sum(small_feeds(config, rows=rows, beams=beams)) + rows * beams * capacity + keys


def steps(config: ModelConfig, precision: Precision, capacity: int) -> list[Step]:
    """Every number of rows, length and beams of the table."""
    return [
        step(config, precision, rows=rows, length=length, beams=beams, capacity=capacity)
        for rows in BATCHES
        for length in LENGTHS
        for beams in BEAMS
        if length <= capacity
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="9b")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp8"), default="bf16")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = SIZES[options.size]
    precision = (
        Precision(storage="bf16", policy=preset("fp8")) if options.precision == "fp8" else Precision(storage=options.precision)
    )
    found = steps(config, precision, options.max_length)
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
        return
    print(
        f"{options.size} in {options.precision}, capacity {options.max_length}: GB read by a step, and ms with lengths / without\n"
    )
    print(
        "| rows | length | beams | weights | caches, with lengths / without | media, with the plugin / without | "
        + " | ".join(CARDS)
        + " | kB sent, by what differs / whole |"
    )
    print("|---" * (7 + len(CARDS)) + "|")
    for each in found:
        times = [
            f"{each.milliseconds(REACHED * rate, lengths=True):.1f} / {each.milliseconds(REACHED * rate, lengths=False):.1f}"
            if each.fits(memory)
            else "does not fit"
            for rate, memory in CARDS.values()
        ]
        cells = [
            str(each.rows), str(each.length), str(each.beams), f"{each.weights / 1e9:.2f}",
            f"{each.caches / 1e9:.2f} / {each.caches_without_lengths / 1e9:.2f}",
            f"{each.media / 1e9:.2f} / {each.media_without_plugin / 1e9:.2f}", *times,
            f"{each.sent / 1e3:.1f} / {each.sent_whole / 1e3:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
