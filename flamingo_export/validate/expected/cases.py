"""The cases of parity, as data made from a model's configuration: token sequences, which medium each `<image>` shows, how they are fed."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from flamingo_export.specs import IMAGE_TOWER, TEXT_TOWER
from flamingo_export.validate.expected import inputs
from flamingo_reference.config import ModelConfig

LAYERS_CASE = "layer by layer"
END_TO_END_CASE = "pixels to logits"
TREE_CASE = "beams as a tree"
PHI_CASES = (
    "text before the first image",
    "no image",
    "adjacent images",
    "image last",
    "32 images",
    "one image shown twice (A, B, A)",
    "a bank shared by requests",
    "padding and batches of different lengths",
    "a nearly full row beside a short one",
    "chunked prefill",
    "a single token",
    TREE_CASE,
)
"""Cases of the decoder that every engine must pass; a report without one of them has failed."""
RESET_CASE = "the end of a text, then another image"
"""The same for models whose text sees no medium after its end."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One batch row. `media` holds the image that each `<image>` of `tokens` shows, in order: image n is bank row n, or where an image is
    several tiles, the rows `image_rows(config, n)`.

    The first `prompt` tokens are prefilled, the others decoded one a call.
    """

    tokens: tuple[int, ...]
    media: tuple[int, ...]
    prompt: int


class BeamSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Decoding steps of several beams after the prompt: at each, beam w continues beam parents[w] with tokens[w]."""

    parents: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


class DecoderCase(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that go through the decoder together.

    chunk: positions of one prefill call at most. keep_rows: rows whose prompt is used up stay in the batch as padding, instead of
    leaving it. from_pixels: media are the frames of `pixels()`, encoded; else the bank is drawn (`bank_rows` images of it).
    """

    name: str
    requests: tuple[Request, ...]
    bank_rows: int
    chunk: int = 1 << 20
    keep_rows: bool = False
    beams: BeamSteps | None = None
    from_pixels: bool = False


class EncoderCase(msgspec.Struct, frozen=True, kw_only=True):
    """One call of vision_encoder, resampler, media_kv or a tower. `rows`: frames, media, latents or pooled features in the batch; `frames`:
    of each medium; `lengths`: tokens of each text."""

    name: str
    subgraph: str
    rows: int
    frames: int = 1
    lengths: tuple[int, ...] = ()


def image_aspect(config: ModelConfig, image: int) -> int:
    """Aspect-ratio id of image `image` of the cases; 0 where an image is one medium."""
    return 0 if config.tiled is None else 1 + (5 * image + 1) % len(config.tiled.aspect_ratios)


def image_rows(config: ModelConfig, image: int) -> range:
    """Bank rows of image `image` of the cases."""
    if config.tiled is None:
        return range(image, image + 1)
    counts = [config.tiled.num_tiles(image_aspect(config, each)) for each in range(image + 1)]
    return range(sum(counts[:-1]), sum(counts))


def phi_cases(config: ModelConfig) -> tuple[str, ...]:
    """Names of the cases of phi that a model's report must have."""
    return PHI_CASES if config.tokens.reset is None else (*PHI_CASES, RESET_CASE)


def encoder_cases(config: ModelConfig) -> tuple[EncoderCase, ...]:
    """vision_encoder, resampler with one, several and more frames than time embeddings (where there are any), media_kv, the towers of a
    contrastive encoder."""
    embeddings = config.resampler.num_time_embeddings
    several = min(3, embeddings or 3)
    videos = []
    if config.resampler.kind == "perceiver":
        videos.append(EncoderCase(name=f"videos of {several} frames", subgraph="resampler", rows=2, frames=several))
    if embeddings:
        many = embeddings + 3
        name = f"a video of {many} frames (interpolated)"
        videos.append(EncoderCase(name=name, subgraph="resampler", rows=1, frames=many))
    return (
        EncoderCase(name="two frames", subgraph="vision_encoder", rows=2),
        EncoderCase(name="images", subgraph="resampler", rows=2),
        *videos,
        EncoderCase(name="two media", subgraph="media_kv", rows=2),
        *_tower_cases(config),
    )


def _tower_cases(config: ModelConfig) -> Iterator[EncoderCase]:
    contrastive = config.contrastive
    if contrastive is None:
        return
    yield EncoderCase(name="three images", subgraph=IMAGE_TOWER, rows=3)
    if contrastive.text is not None:
        most = contrastive.text.max_positions
        lengths = (min(5, most), 1, most, min(2, most))
        yield EncoderCase(name="texts of different lengths", subgraph=TEXT_TOWER, rows=len(lengths), lengths=lengths)
        yield EncoderCase(name="a text by itself", subgraph=TEXT_TOWER, rows=1, lengths=(min(4, most),))


def decoder_cases(config: ModelConfig) -> tuple[DecoderCase, ...]:
    """The hard cases of phi by name, the case that is followed layer by layer, and the one that begins with pixels."""
    make = _Maker(config)
    cases = [
        make.case("text before the first image", "tttttitttt"),
        make.case("no image", "ttttttt"),
        make.case("adjacent images", "tiiittt"),
        make.case("image last", "ttitti"),
        make.case("32 images", make.many_images(32), bank_rows=32 if config.tiled is None else 4),
        make.case("one image shown twice (A, B, A)", "ittittitt", media=[(0, 1, 0)]),
        make.case("a bank shared by requests", "itittt", "itttit", media=[(2, 0), (0, 1)]),
        make.case("padding and batches of different lengths", "tit", "ititttittt", "ttiitt", keep_rows=True, chunk=4),
        make.case("a nearly full row beside a short one", "titttttitttttttttttttittttttttttt", "ti", chunk=8),
        make.case("chunked prefill", "titttttittttitttttttttitt", chunk=8),
        make.case("a single token", "t"),
        make.tree(),
        make.case(LAYERS_CASE, "titttitttttt", chunk=8),
        make.case(END_TO_END_CASE, "titttitttt", media=[(0, 1)], bank_rows=2, from_pixels=True),
    ]
    if config.tokens.reset is not None:
        cases.append(make.case(RESET_CASE, "titteteitt", "ite", "iteit", media=[(3, 0), (2,), (1, 2)], chunk=4))
    assert {case.name for case in cases} == {*phi_cases(config), LAYERS_CASE, END_TO_END_CASE}
    return tuple(cases)


def pixel_cases(config: ModelConfig) -> tuple[DecoderCase, ...]:
    """More cases that begin with pixels, for comparing with a model that takes nothing else: one image, several, text before the first
    image, and for models whose text sees no medium after its end, that."""
    make = _Maker(config)
    patterns = {
        "one image": ("itttt", (1,)),
        "several images": ("itiitt", (0, 1, 0)),
        "text before the first image": ("tttitt", (1,)),
    }
    if config.tokens.reset is not None:
        patterns[RESET_CASE] = ("titteteitt", (0, 1))
    return tuple(
        make.case(f"{name}, from pixels", pattern, media=[media], bank_rows=2, from_pixels=True)
        for name, (pattern, media) in patterns.items()
    )


class _Maker:
    """Turns patterns of `t` (text), `i` (image) and `e` (end of a text) into requests with drawn text tokens, three more to be decoded."""

    decoded = 3

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        ids = config.tokens
        special = {ids.pad, ids.bos, ids.eoc, ids.image, ids.reset}
        self.text = [token for token in range(config.language_model.vocab_size) if token not in special][:4096] or [ids.eoc]

    def tokens(self, key: str, pattern: str) -> tuple[int, ...]:
        ids, drawn = self.config.tokens, iter(self._draw(key, len(pattern)))
        special = {"i": ids.image} if ids.reset is None else {"i": ids.image, "e": ids.reset}
        return tuple(special[kind] if kind in special else next(drawn) for kind in pattern)

    def case(
        self,
        name: str,
        *patterns: str,
        media: list[tuple[int, ...]] | None = None,
        bank_rows: int = 4,
        chunk: int = 1 << 20,
        keep_rows: bool = False,
        from_pixels: bool = False,
    ) -> DecoderCase:
        requests = []
        for index, pattern in enumerate(patterns):
            # Rows of the bank are taken from the end, so that row 0, which padding points at, is not right by chance.
            shown = media[index] if media else tuple(bank_rows - 1 - n % bank_rows for n in range(pattern.count("i")))
            tokens = self.tokens(f"{name}/{index}", pattern + "t" * self.decoded)
            requests.append(Request(tokens=tokens, media=shown, prompt=len(pattern)))
        return DecoderCase(
            name=name, requests=tuple(requests), bank_rows=bank_rows, chunk=chunk, keep_rows=keep_rows, from_pixels=from_pixels
        )

    def many_images(self, count: int) -> str:
        """Text, then images with text after each; side by side, and fewer, where the model's positions end too early for that."""
        limit = self.config.language_model.position_limit
        room = 1 << 20 if limit is None else limit - self.decoded
        if 1 + 2 * count <= room:
            return "t" + "it" * count
        return "t" + "i" * min(count, room - 2) + "t"

    def tree(self) -> DecoderCase:
        prompt = self.tokens(TREE_CASE, "titttit")
        parents = ((0, 0, 0), (2, 0, 0), (1, 1, 2), (2, 0, 1))
        tokens = tuple(self.tokens(f"{TREE_CASE}/{step}", "ttt") for step in range(len(parents)))
        return DecoderCase(
            name=TREE_CASE,
            requests=(Request(tokens=prompt, media=(3, 1), prompt=len(prompt)),),
            bank_rows=4,
            beams=BeamSteps(parents=parents, tokens=tokens),
        )

    def _draw(self, key: str, count: int) -> Iterator[int]:
        return (self.text[index] for index in inputs.integers(f"tokens/{key}", count, 0, len(self.text)))
