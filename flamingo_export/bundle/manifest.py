"""`manifest.json`: what a bundle is, typed and versioned. Written last, atomically: its presence means the bundle is complete."""

from __future__ import annotations

import shlex
import stat
from pathlib import Path
from typing import Literal

import msgspec

from flamingo_export.errors import BundleError
from flamingo_export.files import write_atomically
from flamingo_export.precision import Precision, StorageType
from flamingo_reference.config import ConfigError, ModelConfig
from flamingo_reference.input_format import PAPER, InputFormat

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the bundle: path relative to its root, size in bytes, SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


class GraphRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A portable graph: subgraph name, file at the bundle's root and, for (parts of) the decoder, its LM layers [start, stop)."""

    name: str
    file: str
    layers: tuple[int, int] | None = None


class ProfileSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A use that an engine is compiled for: (least, usual, most) of each size by its letter, memory of its intermediate results."""

    name: str
    bounds: dict[str, tuple[int, int, int]]
    activation_bytes: int | None = None


class EngineSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the builder said of an engine.

    layers of the network before fusion; kernels by kind, over all profiles; attentions in the graph and those that one kernel computes;
    attentions_with_lengths: those that know how many slots of their cache are in use, and need not read the others;
    output_types: kernels that write a type. quantised_products of the graph, and those whose weights a kernel of their own widens before
    they are multiplied (in the profile with the most of them): bytes are saved on the disk then, not in time.
    """

    layers: int
    kernels: dict[str, int]
    attentions: int
    fused_attentions: int
    plugin_layers: int
    cache_updates: int
    output_types: dict[str, int]
    weight_bytes: int
    profiles: tuple[ProfileSummary, ...]
    attentions_with_lengths: int = 0
    quantised_products: int = 0
    widened_products: int = 0


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled engine: which graph, backend and target it is for, and the tool version that can open it.

    lowered: the graph it was compiled from; request: digest of all that the engine depends on but the numbers of the weights; compute: the
    type of its floats. plugin_sha256: of the plugin library it needs, None where it needs none. banned: the tokens that its candidates leave
    out, None in bundles of 0.1.0: `<image>`.
    """

    graph: str
    file: str
    backend: str
    target: str
    tool_version: str
    plugin_sha256: str | None = None
    sha256: str | None = None
    size: int = 0
    request: str | None = None
    lowered: str | None = None
    compute: StorageType | None = None
    banned: tuple[int, ...] | None = None
    summary: EngineSummary | None = None


BRANCHES, BRANCH_MEDIA, BRANCH_TILED = 24, 8, 2
"""Bounds of shared rows that bundles are built with unless others are asked for; the last is of media that are tiles, with large keys."""


class ShapeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Largest sizes that the runtime accepts, and engines are built for."""

    max_length: int
    """C at most: prompt, generated tokens of all beams, one chunk of scratch."""
    chunk: int = 256
    """Positions of one prefill call."""
    chunk_media: int = 16
    """M: media that the positions of one prefill call look at, in engines; a chunk that would look at more is cut."""
    max_tiles: int = 4
    """Media that one position looks at, where it looks at a range: tiles of an image, or of images that stand side by side."""
    bank_rows: int = 64
    """N: media kept encoded."""
    batch: int = 8
    """B: requests side by side. Bounds only engines, as do the following."""
    beams: int = 8
    """S of a decoding step: beams or samples of a request."""
    branches: int = 1
    """S of a decoding step of a row that several requests share, all their beams and samples together; 1: each has a row of its own."""
    branch_media: int = 1
    """M of such a step, in what one request looks at (`max_tiles` media where it looks at a range, else one)."""
    frames: int = 8
    """F: frames of one call of the vision encoder; also N of the resampler and media_kv."""
    video_frames: int = 30
    """T: frames of a video."""


class PlaceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a checkpoint's files lay when the bundle was built: paths from the folder that holds the bundle, none of which leaves it."""

    path: str
    language_model: str | None = None
    vision_encoder: str | None = None
    adapters: tuple[str, ...] = ()
    tokenizer: str | None = None


class SourceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights came from: a checkpoint or live model (digest of all tensors), or random numbers (seed)."""

    kind: Literal["checkpoint", "live", "random"]
    sha256: str | None = None
    towers_sha256: str | None = None
    """Of a contrastive encoder's tensors, which `sha256` leaves out; None where there is none."""
    seed: int | None = None
    family: str | None = None
    """Of a checkpoint: whose format it was in (`flamingo_reference.checkpoints.families.known`)."""
    place: PlaceRecord | None = None
    """Of a checkpoint beside the bundle: where. Nothing is said of what lies elsewhere on the machine."""


class CalibrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where the ranges of a quantised bundle's activations came from: a table that was given, one made while building of the set that
    ships with the package, or none. The table itself is `calibration.json`."""

    origin: Literal["given", "shipped", "none"]
    method: str | None = None
    data_sha256: str | None = None
    samples: int = 0
    tokens: int = 0
    images: int = 0


class ParityRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How parity stands: never assumed. `against` says what the engines were compared with."""

    state: Literal["passed", "failed", "not_run"]
    backends: tuple[str, ...] = ()
    against: Literal["reference", "golden", "transformers"] | None = None
    report: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    config: ModelConfig
    precision: Precision
    limits: ShapeLimits
    source: SourceRecord
    inputs: InputFormat = PAPER
    """How images and text become its input."""
    calibration: CalibrationRecord | None = None
    """None where nothing is quantised."""
    graphs: tuple[GraphRecord, ...]
    engines: tuple[EngineRecord, ...] = ()
    files: tuple[FileRecord, ...]
    parity: ParityRecord = msgspec.field(default_factory=lambda: ParityRecord(state="not_run"))
    tools: dict[str, str] = msgspec.field(default_factory=dict)
    """Versions of the packages that wrote the bundle."""
    notes: tuple[str, ...] = ()
    """What a user should know: that weights are random, that the tokenizer is a stand-in."""

    def graph(self, name: str) -> GraphRecord:
        """The graph of that name. Raises BundleError."""
        for record in self.graphs:
            if record.name == name:
                return record
        raise BundleError(
            f"the bundle has no graph {name!r}; it has {', '.join(graph.name for graph in self.graphs)}. Build it again."
        )

    def decoder_graphs(self) -> list[tuple[GraphRecord, range]]:
        """The graphs that make up the decoder, in order, with their LM layers. Raises BundleError unless they are all of them, once."""
        whole = range(self.config.language_model.num_layers)
        found = [
            (graph, range(*graph.layers) if graph.layers else whole)
            for graph in self.graphs
            if graph.name == "decoder" or graph.layers is not None
        ]
        found.sort(key=lambda pair: pair[1].start)
        covered = [layer for _, layers in found for layer in layers]
        if covered != list(whole):
            raise BundleError(
                f"the bundle's decoder graphs cover LM layers {covered}, expected 0 to {whole.stop - 1}. Build it again."
            )
        return found


_MAKE = "flamingo-export build --size nano (or --checkpoint FOLDER)"


class _Version(msgspec.Struct):
    schema_version: int


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of the bundle in folder `bundle`.

    Raises BundleError if the folder is not a complete bundle, the manifest is malformed, of an impossible model, or its schema is newer
    than this version.
    """
    path = bundle / MANIFEST_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device, which a link can lead to, may never end
            raise BundleError(f"{path} is not a file. Build the bundle again, or copy it again from where it came.")
        text = path.read_bytes()
    except FileNotFoundError:
        if not bundle.exists():
            raise BundleError(f"{bundle} does not exist. Make it: {_MAKE} --out {shlex.quote(str(bundle))}") from None
        raise BundleError(
            f"{bundle} has no {MANIFEST_NAME}, so it is not a complete bundle. Build it again: {_MAKE} "
            f"--out {shlex.quote(str(bundle))}"
        ) from None
    except NotADirectoryError:
        raise BundleError(f"{bundle} is not a folder, and a bundle is one: the folder that holds {MANIFEST_NAME}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    try:
        version = msgspec.json.decode(text, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema {version}; this flamingo-export reads up to {SCHEMA_VERSION}. Upgrade flamingo-export."
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        from flamingo_reference.checkpoints.files.failed_downloads import stand_in  # it imports numpy, which help does without

        if (found := stand_in(path)) is not None:
            raise BundleError(f"{path} is {found}") from error
        raise BundleError(f"{path} is malformed ({error}). Build the bundle again.") from error
    try:
        manifest.config.validate()
    except ConfigError as error:
        raise BundleError(f"the manifest of {bundle} is invalid: {error}. Build the bundle again.") from error
    return manifest


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically: readers see the old one or the new one, never half."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    write_atomically(bundle / MANIFEST_NAME, data + b"\n")


_MOST_SLOTS = 8192
_IMAGES_OF_TILES, _IMAGES_SIDE_BY_SIDE = 8, 4


def default_limits(config: ModelConfig) -> ShapeLimits:
    """Twice the positions that the model knows, 2048 at least and 8192 at most: room for 32 shots, the beams' tokens and a chunk of scratch.

    The cache grows as it is needed, so a high limit costs nothing until it is used; engines have all of it. Where images are tiles, whose
    keys take megabytes, the bank holds eight images of as many as can be, and a token may see four of them.
    """
    length = min(max(2048, 2 * config.language_model.max_positions), _MOST_SLOTS)
    limits = ShapeLimits(max_length=length, branches=BRANCHES, branch_media=BRANCH_MEDIA)
    if config.tiled is None:
        return limits
    tiles = config.tiled.max_tiles
    bank_rows, most = _IMAGES_OF_TILES * tiles, _IMAGES_SIDE_BY_SIDE * tiles
    return msgspec.structs.replace(
        limits,
        bank_rows=bank_rows,
        max_tiles=most,
        branch_media=BRANCH_TILED,
        frames=2,  # images are encoded one by one
    )
