"""The contrastive encoder that a checkpoint may have beside the model: an image and a text tower into one joint space.

    pixels -- vision_encoder --> features, pooled -- image_tower --> embedding of length 1
    token ids -- text_tower -->                                      embedding of length 1

Kinds are put together from typed choices, as the model is: CLIP's (Radford et al. 2021, arXiv 2103.00020), and the paper's, an NFNet and a
BERT (Flamingo, arXiv 2204.14198, appendix B.1.3; Devlin et al. 2018). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

ReadoutActivation = Literal["relu", "squared_relu", "gelu", "quick_gelu"]
TextActivation = Literal["gelu", "quick_gelu"]


class ClassToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="class_token"):
    """pooled [F, E]: the class token of a ViT as it leaves the last layer, before any norm (CLIP)."""


class GridMean(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mean"):
    """pooled [F, E]: the mean of the features over their positions (the paper)."""


class Readout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="readout"):
    """pooled [F, R * W]: latents of a Perceiver Resampler of its own that reads the features of one frame, one after the other."""

    num_latents: int
    width: int
    num_layers: int
    num_heads: int
    head_size: int
    ffw_width: int
    activation: ReadoutActivation = "squared_relu"


Pooling = ClassToken | GridMean | Readout


class TextConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A transformer over a text's tokens. The defaults are CLIP's: causal, pre-norm, read at the last token. BERT's layers are post-norm,
    with a norm of the embeddings and none at the end, and see all tokens."""

    num_layers: int
    width: int
    num_heads: int
    ffw_width: int
    vocab_size: int
    max_positions: int
    """Most tokens of a text."""
    activation: TextActivation = "quick_gelu"
    norm_eps: float = 1e-5
    causal: bool = True
    """Whether a token sees those before it and itself only."""
    post_norm: bool = False
    """Whether a layer normalises what each half has added (BERT), or what each half reads."""
    embedding_norm: bool = False
    """Whether embeddings are normalised before the first layer."""
    final_norm: bool = True
    """Whether the last layer's output is normalised before it is pooled."""
    pooling: Literal["last", "first", "mean"] = "last"
    """last: the text's last token, which ends it (CLIP). first: the token that begins it. mean: over the text's tokens (the paper)."""

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads


class ContrastiveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What projects images and texts into the joint space. Without a text tower only images are embedded."""

    joint_width: int
    """J: width of an embedding."""
    pooling: Pooling
    image_norm: bool = False
    """Whether pooled features are normalised before their projection (CLIP)."""
    norm_eps: float = 1e-5
    """Of `image_norm`."""
    text: TextConfig | None = None
    template: str = "{}"
    """What a label is put into to be compared with images, where the caller names no other."""


PAPER_JOINT_WIDTH = 1376
"""Flamingo, appendix B.1.3."""


def paper_contrastive(text: TextConfig) -> ContrastiveConfig:
    """The paper's kind: means over the grid and over the tokens, each projected without a bias. text: the BERT, whose sizes the paper does
    not give."""
    return ContrastiveConfig(joint_width=PAPER_JOINT_WIDTH, pooling=GridMean(), text=text)


def bert(*, num_layers: int, width: int, num_heads: int, ffw_width: int, vocab_size: int, max_positions: int) -> TextConfig:
    """A BERT read by the mean of its tokens. Its embedding of the first segment is part of the position embeddings."""
    return TextConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        ffw_width=ffw_width,
        vocab_size=vocab_size,
        max_positions=max_positions,
        activation="gelu",
        norm_eps=1e-12,
        causal=False,
        post_norm=True,
        embedding_norm=True,
        final_norm=False,
        pooling="mean",
    )


MOST_LAYERS = 10_000
MOST_TOKENS = 1 << 20


def faults(config: ContrastiveConfig, *, vision: str) -> Iterator[str]:
    """What makes it impossible to build. vision: the tag of the model's vision encoder."""
    sizes: list[tuple[str, msgspec.Struct]] = [("contrastive", config), ("contrastive.pooling", config.pooling)]
    if config.text is not None:
        sizes.append(("contrastive.text", config.text))
    for where, part in sizes:
        for field, value in msgspec.structs.asdict(part).items():
            if field == "norm_eps" and not 0 < value < 1:
                yield f"{where}.norm_eps is {value}, expected a small positive number"
            if type(value) is int and value < 1:
                yield f"{where}.{field} is {value}, expected at least 1"
            if field == "num_layers" and value > MOST_LAYERS:
                yield f"{where}.num_layers is {value}, expected at most {MOST_LAYERS}"
    if config.text is not None:
        text = config.text
        if text.num_heads > 0 and text.width % text.num_heads:
            yield f"contrastive.text.num_heads {text.num_heads} does not divide contrastive.text.width {text.width}"
        if text.max_positions > MOST_TOKENS:
            yield f"contrastive.text.max_positions is {text.max_positions}, expected at most {MOST_TOKENS}"
    if vision not in ("nfnet", "vit"):
        yield f"contrastive goes with an NFNet or CLIP's ViT; a vision encoder of kind {vision!r} gives features only"
    elif isinstance(config.pooling, ClassToken) and vision != "vit":
        yield f"contrastive.pooling is the class token, which a vision encoder of kind {vision!r} does not have"
    if config.template.count("{}") != 1:
        yield f"contrastive.template is {config.template[:80]!r}, expected a text with one {{}} for the label"
