"""What a Flamingo model is made of: typed configuration and the paper's sizes.

Defaults are the paper's model; the other values of a choice are those of the families whose checkpoints people have (OpenFlamingo,
IDEFICS, Llama 3.2 Vision). Nothing here imports torch: the exporter and the runtime read the same description as the reference model.
Sources: Flamingo (arXiv 2204.14198, tables 1 and 5), Brock et al. 2021 (NFNet), Hoffmann et al. 2022 (Chinchilla).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

import msgspec

from flamingo_reference.contrastive_config import ContrastiveConfig
from flamingo_reference.contrastive_config import faults as contrastive_faults

Activation = Literal["relu", "squared_relu", "gelu", "quick_gelu"]
"""gelu is the exact one (erf); quick_gelu is x * sigmoid(1.702 x), CLIP's."""
FeedForward = Literal["relu", "squared_relu", "gelu", "quick_gelu", "swiglu"]
"""down(activation(up(x))), or for swiglu down(swish(gate(x)) * up(x)) (Shazeer 2020)."""
Norm = Literal["layer_norm", "rms_norm"]


class ConfigError(ValueError):
    """A model configuration that cannot be built; the message names the field."""


class NFNetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="nfnet"):
    """NFNet vision encoder (Brock et al. 2021) without classifier; the final grid is the output.

    The four stem convolutions stride by 4, the first stage by 1, each later one by 2.
    """

    image_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem_widths: tuple[int, int, int, int]
    feature_width: int
    group_width: int = 128
    bottleneck_ratio: float = 0.5
    squeeze_excite_ratio: float = 0.5
    alpha: float = 0.2

    @property
    def stride(self) -> int:
        """Pixels of the image a position of the final grid stands for, along one side."""
        return 4 << (len(self.widths) - 1)

    @property
    def num_patches(self) -> int:
        """P: positions of the final grid (SAME padding rounds up)."""
        side = -(-self.image_size // self.stride)
        return side * side


class ViTConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vit"):
    """CLIP's vision transformer (Radford et al. 2021): patches, a class token, learned positions, a norm before pre-norm layers."""

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    ffw_width: int
    activation: Activation = "quick_gelu"
    class_token: bool = False
    """Whether the class token is the first of the features, or left out of them."""
    final_norm: bool = False
    """Whether the features went through a LayerNorm after the last layer."""
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads

    @property
    def feature_width(self) -> int:
        """E: width of a feature."""
        return self.width

    @property
    def grid_size(self) -> int:
        """Patches of the image; pixels beyond the last whole patch are not read."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_patches(self) -> int:
        """P: features of an image, the class token among them where it is kept."""
        return self.grid_size + self.class_token


class TiledViTConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="tiled_vit"):
    """Llama 3.2 Vision's transformer: an image is 1 to `max_tiles` square tiles, whose patches all see each other.

    An image always fills `max_tiles` places; the tiles that it does not have are padding, and so are the tokens that round a tile's up
    to a multiple of 8. Real tokens attend to padding too; padding attends to real tokens only (Meta's code, and transformers').
    """

    image_size: int
    """Side of a tile."""
    patch_size: int
    width: int
    num_layers: int
    num_global_layers: int
    """Layers after those, with tanh gates on both halves."""
    num_heads: int
    ffw_width: int
    max_tiles: int = 4
    feature_layers: tuple[int, ...] = ()
    """Layers whose inputs are features too, beside the final state and after it."""
    activation: Activation = "gelu"
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads

    @property
    def feature_width(self) -> int:
        """E: width of a feature, the final state and the chosen layers' inputs side by side."""
        return self.width * (1 + len(self.feature_layers))

    @property
    def grid_size(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_patches(self) -> int:
        """P: features of a tile, the class token first."""
        return self.grid_size + 1

    @property
    def padded_patches(self) -> int:
        """Tokens of a tile inside the transformer: P rounded up to a multiple of 8."""
        return -(-self.num_patches // 8) * 8

    @property
    def aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of tiles that an image may have; aspect-ratio id n is the n-th of them, 0 none."""
        sides = range(1, self.max_tiles + 1)
        return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_tiles)

    def num_tiles(self, aspect_ratio_id: int) -> int:
        """Tiles of an image with this aspect-ratio id, 0 for id 0. Raises ValueError for an id that there is not."""
        if not 0 <= aspect_ratio_id <= len(self.aspect_ratios):
            raise ValueError(f"aspect-ratio id {aspect_ratio_id}, expected one from 0 to {len(self.aspect_ratios)}")
        return math.prod(self.aspect_ratios[aspect_ratio_id - 1]) if aspect_ratio_id else 0


class OwnVisionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="own"):
    """A vision encoder that is not one of ours: any torch module from pixels [F, 3, I, I] to features [F, P, E]. It comes with the model, its
    tensors are not in our checkpoints, and its graph is traced from it."""

    image_size: int
    num_patches: int
    """P: features of an image."""
    feature_width: int
    """E: width of a feature."""


VisionConfig = NFNetConfig | ViTConfig | TiledViTConfig | OwnVisionConfig


class ResamplerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From [T, P, E] features of one medium to [R, W] latents: the Perceiver Resampler, or a projector in its place."""

    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffw_width: int
    num_latents: int = 64
    num_time_embeddings: int = 8
    """0: frames are distinguished by nothing, and the subgraph has no `time_weights`."""
    activation: Activation = "squared_relu"
    input_proj: bool = True
    """Whether features are projected to the resampler's width, or have it already."""
    qk_norm: bool = False
    """LayerNorm of each head's queries and keys."""
    kind: Literal["perceiver", "projector"] = "perceiver"
    """projector: one matrix with a bias; a medium is one frame, whose P projected features are its latents (`projector_config`)."""


def projector_config(*, num_latents: int, width: int) -> ResamplerConfig:
    """A projector: no layers, no heads, no time embeddings. num_latents: P, the features of a medium."""
    return ResamplerConfig(
        kind="projector", num_layers=0, width=width, num_heads=0, head_size=0, ffw_width=0, num_latents=num_latents,
        num_time_embeddings=0,
    )  # fmt: skip


class CrossAttentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gated xattn-dense blocks, one before language model layer i when i % every == offset."""

    every: int
    num_heads: int
    head_size: int
    ffw_width: int
    offset: int = 0
    norm: Norm = "layer_norm"
    """Of both halves' inputs; media are not normalised."""
    norm_eps: float = 1e-5
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys."""
    feed_forward: FeedForward = "squared_relu"
    gate: Literal["scalar", "vector", "none"] = "scalar"
    """tanh gates: one number, or one for each channel; none: both halves are added as they are (the paper's ablation without gates)."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by as many query heads; None: one for each."""
    sees: Literal["last", "group"] = "last"
    """What a token sees: the last image, or of the images that stand side by side, with no token between them, those up to the last."""
    without_media: Literal["feed_forward", "nothing"] = "feed_forward"
    """What the block does to a token that sees no medium: only its attention is zero, or the token passes the block unchanged."""

    @property
    def kv_heads(self) -> int:
        """Heads in the media bank."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class RelativePositions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="relative"):
    """Transformer-XL (Dai et al. 2019): a learned projection of the distance. Beyond max_positions - 1 it reads the last entry."""


class Llama3Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Llama 3.1's slower turning for longer texts: pairs of channels whose wave is longer than original / low are slowed by `factor`,
    those shorter than original / high are left, and between the two the change is gradual (transformers, `rope_type` llama3)."""

    factor: float
    low: float
    high: float
    original: int
    """Positions that the model was first trained with."""

    def rate(self, frequency: float) -> float:
        """What a pair's angle for one position is multiplied with."""
        waves = self.original * frequency / (2 * math.pi)
        smooth = min(1.0, max(0.0, (waves - self.low) / (self.high - self.low)))
        return (1 - smooth) / self.factor + smooth


class RotaryPositions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="rotary"):
    """Queries and keys turned by their position (Su et al. 2021), halves paired: channel c goes with c + size / 2."""

    size: int
    """Channels of a head that are turned, the first ones; the others are left as they are (GPT-NeoX)."""
    base: float = 10000.0
    scaling: Llama3Scaling | None = None

    def rates(self) -> list[float] | None:
        """What each pair's angle is multiplied with; None: nothing."""
        if self.scaling is None:
            return None
        half = self.size // 2
        return [self.scaling.rate(self.base ** (-pair / half)) for pair in range(half)]


class AlibiPositions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alibi"):
    """A penalty that grows with the distance, at another rate for each head (Press et al. 2022)."""

    max_bias: float = 8.0
    rounded: bool = True
    """Whether slopes are those of the next power of two heads (MPT), or of as many heads as there are (MosaicGPT, before it was MPT)."""

    def slopes(self, num_heads: int) -> list[float]:
        """Each head's penalty for a distance of one: 2 ** (-max_bias * (head + 1) / heads).

        MPT takes heads as the next power of two, and of its slopes every second one, the finer ones first.
        """
        whole = 2 ** math.ceil(math.log2(num_heads)) if self.rounded else num_heads
        slopes = [2.0 ** (-self.max_bias * (head + 1) / whole) for head in range(whole)]
        return slopes if whole == num_heads else [*slopes[1::2], *slopes[::2]][:num_heads]


class LanguageModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pre-norm decoder. The defaults are Chinchilla's: RMSNorm, Transformer-XL positions, GELU feed-forward, no biases, tied output."""

    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffw_width: int
    vocab_size: int
    max_positions: int
    """Relative: distances beyond max_positions - 1 read the table's last entry. Rotary: the table's length, positions beyond are refused."""
    norm_eps: float = 1e-6
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by as many query heads; None: one for each."""
    positions: RelativePositions | RotaryPositions | AlibiPositions = RelativePositions()
    norm: Norm = "rms_norm"
    norm_bias: bool = False
    """Whether LayerNorms have a bias."""
    qk_norm: bool = False
    """LayerNorm, without bias, of queries and keys before they are split into heads (MPT)."""
    feed_forward: FeedForward = "gelu"
    bias: bool = False
    """Whether the projections of attention and feed-forward have biases."""
    parallel: bool = False
    """Whether attention and feed-forward both read the layer's input (GPT-NeoX), or the feed-forward what attention made of it."""
    tied_head: bool = True
    """Whether the output is the embedding, or a matrix of its own."""
    extra_embeddings: int = 0
    """Rows that the embedding has beyond the output's `vocab_size`: tokens that are read and can never be generated."""

    @property
    def embedding_rows(self) -> int:
        """Tokens that the model can read."""
        return self.vocab_size + self.extra_embeddings

    @property
    def kv_heads(self) -> int:
        """Heads in the cache."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def uses_distances(self) -> bool:
        """Whether attention depends on how far apart positions are; otherwise keys hold all that is to be known of theirs."""
        return not isinstance(self.positions, RotaryPositions)

    @property
    def position_limit(self) -> int | None:
        """Positions that the model has; None where there is no end."""
        return self.max_positions if isinstance(self.positions, RotaryPositions) else None


class TokenIds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids of the tokens that carry structure."""

    pad: int
    bos: int
    eoc: int
    image: int
    reset: int | None = None
    """After this token no medium is seen until the next one (IDEFICS: the end of a text); None: the last one is seen on."""
    ends: tuple[int, ...] = ()
    """Tokens that end a text besides `eoc`."""
    banned: tuple[int, ...] = ()
    """Tokens that are never generated besides `image`."""

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens that end a text, `eoc` first."""
        return (self.eoc, *self.ends)

    @property
    def never(self) -> tuple[int, ...]:
        """All tokens that are never generated, `image` first. Those that have a logit (`ModelConfig.banned_logits`) are taken out before
        the softmax."""
        return (self.image, *self.banned)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole Flamingo."""

    name: str
    vision: VisionConfig
    resampler: ResamplerConfig
    cross_attention: CrossAttentionConfig
    language_model: LanguageModelConfig
    tokens: TokenIds
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of RGB in 0..1; also the colour images are padded with."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    contrastive: ContrastiveConfig | None = None
    """The contrastive encoder beside the model, which shares its vision encoder; None where the checkpoint has none."""

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """LM layers with a gated cross-attention block before them, in order; media_k.i is the i-th of them."""
        return tuple(range(self.cross_attention.offset, self.language_model.num_layers, self.cross_attention.every))

    @property
    def banned_logits(self) -> tuple[int, ...]:
        """The columns of the logits that are taken out before the softmax: `tokens.never`, but for tokens beyond the output's rows."""
        return tuple(token for token in self.tokens.never if token < self.language_model.vocab_size)

    @property
    def sees_groups(self) -> bool:
        """Whether a token sees a range of media, first_media to phi, or the one that phi names."""
        return self.cross_attention.sees == "group"

    @property
    def tiled(self) -> TiledViTConfig | None:
        """The vision encoder where an image is several media, its tiles; None where an image is one."""
        return self.vision if isinstance(self.vision, TiledViTConfig) else None

    def validate(self) -> None:
        """Raises ConfigError naming each field that makes the model impossible to build."""
        faults = [*_sizes(self), *_vision(self.vision), *_bridge(self), *_language_model(self.language_model), *_tokens(self)]
        if self.contrastive is not None:
            faults += contrastive_faults(self.contrastive, vision=str(type(self.vision).__struct_config__.tag))
        if min(self.pixel_std) <= 0:
            faults.append(f"pixel_std {self.pixel_std} has an entry that is not positive")
        if faults:
            raise ConfigError(f"model config {self.name!r}: " + "; ".join(faults))


_MOST_LAYERS = 10_000
"""Hundreds of times what models have: every layer has names of its own, so a number that is not one must not be counted up to."""
_MOST_POSITIONS = 1 << 24
_MOST_TILES = 64
_MAY_BE_ZERO = (
    "cross_attention.offset",
    "resampler.num_time_embeddings",
    "language_model.extra_embeddings",
    "vision.num_global_layers",
    "vision.feature_layers",
)
_NONE_IN_A_PROJECTOR = ("num_layers", "num_heads", "head_size", "ffw_width", "num_time_embeddings")


def _sizes(config: ModelConfig) -> Iterator[str]:
    for part in ("vision", "resampler", "cross_attention", "language_model"):
        for field, value in msgspec.structs.asdict(getattr(config, part)).items():
            least = 0 if f"{part}.{field}" in _MAY_BE_ZERO else 1
            if part == "resampler" and config.resampler.kind == "projector" and field in _NONE_IN_A_PROJECTOR:
                if value != 0:
                    yield f"{part}.{field} is {value}, a projector has none"
                continue
            if field == "norm_eps" and not 0 < value < 1:
                yield f"{part}.norm_eps is {value}, expected a small positive number"
            counts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(count, int) and not isinstance(count, bool) and count < least for count in counts):
                yield f"{part}.{field} is {value}, expected at least {least}"
            if field in ("num_layers", "depths") and max(counts, default=0) > _MOST_LAYERS:
                yield f"{part}.{field} is {value}, expected at most {_MOST_LAYERS}"


def _vision(vision: VisionConfig) -> Iterator[str]:
    if isinstance(vision, OwnVisionConfig):
        return
    if isinstance(vision, TiledViTConfig):
        yield from _tiles(vision)
    if isinstance(vision, ViTConfig | TiledViTConfig):
        if vision.num_heads > 0 and vision.width % vision.num_heads:
            yield f"vision.num_heads {vision.num_heads} does not divide vision.width {vision.width}"
        if vision.image_size < vision.patch_size:
            yield f"vision.patch_size {vision.patch_size} is larger than vision.image_size {vision.image_size}"
        return
    if len(vision.widths) != len(vision.depths) or not vision.widths:
        yield f"vision.widths {vision.widths} and vision.depths {vision.depths} differ in length or are empty"
    ratios = {"bottleneck_ratio": vision.bottleneck_ratio, "squeeze_excite_ratio": vision.squeeze_excite_ratio}
    wrong = [f"vision.{name} is {ratio}, expected one from 0 to 16" for name, ratio in ratios.items() if not 0 < ratio <= 16]
    yield from wrong
    for width in () if wrong else vision.widths:
        middle = int(width * vision.bottleneck_ratio)
        if vision.group_width > 0 and (middle < 1 or middle % vision.group_width):
            yield f"vision.group_width {vision.group_width} does not divide bottleneck width {middle}"


def _tiles(vision: TiledViTConfig) -> Iterator[str]:
    if vision.max_tiles > _MOST_TILES:
        yield f"vision.max_tiles is {vision.max_tiles}, expected at most {_MOST_TILES}"
    if any(layer >= vision.num_layers for layer in vision.feature_layers):
        yield f"vision.feature_layers {vision.feature_layers} names a layer beyond the {vision.num_layers} that there are"
    if len(set(vision.feature_layers)) != len(vision.feature_layers):
        yield f"vision.feature_layers {vision.feature_layers} names a layer twice"


def _bridge(config: ModelConfig) -> Iterator[str]:
    resampler, block = config.resampler, config.cross_attention
    if resampler.kind == "projector" and resampler.num_latents != config.vision.num_patches:
        yield f"resampler.num_latents {resampler.num_latents} differs from the {config.vision.num_patches} features of a medium"
    if resampler.kind == "projector" and not resampler.input_proj:
        yield "resampler.input_proj is false: a projector is that matrix and nothing else"
    if isinstance(config.vision, TiledViTConfig) and resampler.kind != "projector":
        yield "resampler.kind is perceiver; tiles go through a projector"
    if block.kv_heads > 0 and block.num_heads % block.kv_heads:
        yield f"cross_attention.num_kv_heads {block.kv_heads} does not divide num_heads {block.num_heads}"
    if not resampler.input_proj and resampler.width != config.vision.feature_width:
        yield (
            f"resampler.width {resampler.width} differs from the vision encoder's {config.vision.feature_width}, "
            "which needs resampler.input_proj"
        )
    if block.every > 0 and not 0 <= block.offset < block.every:
        yield f"cross_attention.offset {block.offset} is outside 0 to {block.every - 1}"
    elif block.every > 0 and config.language_model.num_layers > 0 and block.offset >= config.language_model.num_layers:
        yield f"no layer is gated: cross_attention.offset {block.offset} of {config.language_model.num_layers} layers"


def _language_model(lm: LanguageModelConfig) -> Iterator[str]:
    if isinstance(lm.positions, RelativePositions) and lm.width % 2:
        yield f"language_model.width {lm.width} is odd; the sinusoids of relative positions come in pairs"
    if isinstance(lm.positions, RotaryPositions):
        size = lm.positions.size
        if size < 2 or size % 2 or size > lm.head_size:
            yield f"language_model.positions.size {size} is not an even number of channels from 2 to head_size {lm.head_size}"
        if not 0 < lm.positions.base < math.inf:
            yield f"language_model.positions.base is {lm.positions.base}, expected a positive number"
        if (scaling := lm.positions.scaling) is not None and not (
            0 < scaling.low < scaling.high < math.inf and 0 < scaling.factor < math.inf and scaling.original > 0
        ):
            yield f"language_model.positions.scaling is {scaling}, expected positive numbers, low below high"
    if isinstance(lm.positions, AlibiPositions) and not 0 < lm.positions.max_bias < math.inf:
        yield f"language_model.positions.max_bias is {lm.positions.max_bias}, expected a positive number"
    if lm.max_positions > _MOST_POSITIONS:
        yield f"language_model.max_positions is {lm.max_positions}, expected at most {_MOST_POSITIONS}"
    if lm.kv_heads > 0 and lm.num_heads % lm.kv_heads:
        yield f"language_model.num_kv_heads {lm.kv_heads} does not divide num_heads {lm.num_heads}"
    if lm.norm == "rms_norm" and lm.norm_bias:
        yield "language_model.norm_bias is for LayerNorm; RMSNorm has no bias"
    if lm.tied_head and lm.extra_embeddings:
        yield f"language_model.extra_embeddings is {lm.extra_embeddings}: a head tied to the embedding has all of its rows"


def _tokens(config: ModelConfig) -> Iterator[str]:
    tokens, size = config.tokens, config.language_model.vocab_size
    for field, value in msgspec.structs.asdict(tokens).items():
        known = config.language_model.embedding_rows if field in ("pad", "image") else size
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < known:
                yield f"tokens.{field} {token} is outside the vocabulary of {known}"
    for field, first, more in (("ends", tokens.eoc, tokens.ends), ("banned", tokens.image, tokens.banned)):
        if len({first, *more}) != 1 + len(more):
            yield f"tokens.{field} {more} names a token twice, or {first}, which is among them already"
    if size > 0 and len(config.banned_logits) >= size:
        yield f"tokens.banned leaves none of {size} tokens to generate"
    if tokens.image in (tokens.pad, tokens.bos, tokens.eoc, tokens.reset):
        yield f"tokens.image {tokens.image} is also another token; every occurrence of it stands for a medium"


# F6's widths and depths: Brock et al. 2021, table 6. 320 pixels: Flamingo, section 3.1.1 of the appendix.
NFNET_F6 = NFNetConfig(
    image_size=320,
    widths=(256, 512, 1536, 1536),
    depths=(7, 14, 42, 21),
    stem_widths=(16, 32, 64, 128),
    feature_width=3072,
)
# Flamingo, table 5: the resampler is the same in all sizes.
PAPER_RESAMPLER = ResamplerConfig(num_layers=6, width=1536, num_heads=16, head_size=96, ffw_width=6144)
PAPER_TOKENS = TokenIds(pad=0, bos=1, eoc=2, image=3)


def _paper_model(name: str, *, layers: int, width: int, every: int) -> ModelConfig:
    """Flamingo, table 5: heads of 128, feed-forward 4 times the width; 32k vocabulary and 2048 positions: Chinchilla."""
    heads = width // 128
    return ModelConfig(
        name=name,
        vision=NFNET_F6,
        resampler=PAPER_RESAMPLER,
        cross_attention=CrossAttentionConfig(every=every, num_heads=heads, head_size=128, ffw_width=4 * width),
        language_model=LanguageModelConfig(
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_size=128,
            ffw_width=4 * width,
            vocab_size=32000,
            max_positions=2048,
        ),
        tokens=PAPER_TOKENS,
    )


# Trained here (flamingo_reference.nano): every choice is ours. Three stages, so stride 16: 64x64 pixels give 4x4 positions.
NANO = ModelConfig(
    name="nano",
    vision=NFNetConfig(
        image_size=64, widths=(32, 96, 192), depths=(1, 2, 1), stem_widths=(8, 16, 16, 32), feature_width=192, group_width=16
    ),
    resampler=ResamplerConfig(num_layers=2, width=128, num_heads=4, head_size=32, ffw_width=256, num_latents=16),
    cross_attention=CrossAttentionConfig(every=2, num_heads=4, head_size=32, ffw_width=256),
    language_model=LanguageModelConfig(
        num_layers=6, width=128, num_heads=4, head_size=32, ffw_width=512, vocab_size=512, max_positions=512
    ),
    tokens=PAPER_TOKENS,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)


def _llama_vision(name: str, *, layers: int, width: int, heads: int, ffw_width: int, image_size: int = 560) -> ModelConfig:
    """Llama 3.2 Vision (config.json of its checkpoints): vision tower and tokens are the same in both sizes; 448 pixels in 11B base."""
    vision = TiledViTConfig(
        image_size=image_size, patch_size=14, width=1280, num_layers=32, num_global_layers=8, num_heads=16, ffw_width=5120,
        feature_layers=(3, 7, 15, 23, 30),
    )  # fmt: skip
    return ModelConfig(
        name=name,
        vision=vision,
        resampler=projector_config(num_latents=vision.num_patches, width=width),
        cross_attention=CrossAttentionConfig(
            every=4, offset=3, num_heads=heads, num_kv_heads=8, head_size=128, ffw_width=ffw_width, norm="rms_norm",
            qk_norm=True, feed_forward="swiglu", sees="group", without_media="nothing",
        ),
        language_model=LanguageModelConfig(
            num_layers=layers, width=width, num_heads=heads, num_kv_heads=8, head_size=128, ffw_width=ffw_width,
            vocab_size=128256, extra_embeddings=8, max_positions=131072, norm_eps=1e-5, feed_forward="swiglu", tied_head=False,
            positions=RotaryPositions(
                size=128, base=500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=8192)
            ),
        ),
        tokens=TokenIds(pad=128004, bos=128000, eoc=128009, image=128256, ends=(128001, 128008)),
        pixel_mean=(0.48145466, 0.4578275, 0.40821073),
        pixel_std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip


SIZES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "nano": NANO,
        "3b": _paper_model("3b", layers=24, width=2048, every=1),
        "9b": _paper_model("9b", layers=40, width=4096, every=4),
        "80b": _paper_model("80b", layers=80, width=8192, every=7),
        "llama-3.2-11b-vision": _llama_vision("llama-3.2-11b-vision", layers=32, width=4096, heads=32, ffw_width=14336),
        "llama-3.2-90b-vision": _llama_vision("llama-3.2-90b-vision", layers=80, width=8192, heads=64, ffw_width=28672),
    }
)

# Parameter counts the paper quotes (sections 3.1 and appendix B.1); they do not all follow from its own table of shapes.
QUOTED_PARAMETERS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "3b": {"vision_encoder": 435e6, "resampler": 194e6, "cross_attention": 1.2e9, "language_model": 1.4e9, "total": 3.2e9},
        "9b": {"vision_encoder": 435e6, "resampler": 194e6, "cross_attention": 1.6e9, "language_model": 7.1e9, "total": 9.3e9},
        "80b": {"vision_encoder": 435e6, "resampler": 194e6, "cross_attention": 10e9, "language_model": 70e9, "total": 80e9},
    }
)
