"""Vision encoders: NFNet, CLIP's ViT, the transformer over tiles, or one of the user's own."""

from __future__ import annotations

import math

import msgspec

from flamingo_reference.config.choices import Activation


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
