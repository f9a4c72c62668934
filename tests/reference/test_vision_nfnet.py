"""The vision encoder against timm's NFNet, which is not ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import randomise
from torch import Tensor, nn

from flamingo_reference.config import NFNET_F6, SIZES, NFNetConfig
from flamingo_reference.model.vision_nfnet import NFNet, pad_same
from flamingo_reference.names import parameter_counts, squeeze_width


def timm_twin(nfnet: ModuleType, config: NFNetConfig) -> nn.Module:
    """timm's member of the same sizes, with DeepMind's conventions (gamma in the activation, SAME padding, SkipInit)."""
    cfg = nfnet.NfCfg(
        depths=config.depths,
        channels=config.widths,
        stem_type="deep_quad",
        stem_chs=config.stem_widths[-1],
        group_size=config.group_width,
        bottle_ratio=config.bottleneck_ratio,
        extra_conv=True,
        gamma_in_act=True,
        same_padding=True,
        skipinit=True,
        num_features=config.feature_width,
        act_layer="gelu",
        attn_layer="se",
        attn_kwargs={"rd_ratio": config.squeeze_excite_ratio},
    )
    model: nn.Module = nfnet.NormFreeNet(cfg, num_classes=0)
    return model


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for timm's tensors."""
    found = {}
    for name, tensor in state.items():
        name = name.replace("skipinit_gain", "skip_gain").replace("attn_last.", "squeeze_excite.")
        name = name.replace("downsample.conv.", "downsample.")
        if name.startswith("stem.conv"):
            number, rest = name.removeprefix("stem.conv").split(".", 1)
            name = f"stem.{int(number) - 1}.{rest}"
        found[name] = tensor
    return found


THREE_STAGES = NFNetConfig(
    image_size=64, widths=(16, 32, 48), depths=(2, 3, 1), stem_widths=(4, 8, 16, 32), feature_width=64, group_width=8
)
# The stem is as wide as the first stage, which needs no convolution on its shortcut; the third needs one for its stride alone.
FOUR_STAGES = NFNetConfig(
    image_size=64, widths=(32, 48, 48, 80), depths=(1, 2, 1, 1), stem_widths=(4, 8, 16, 32), feature_width=48, group_width=8
)


@pytest.mark.parametrize("image_size", [64, 37, 50])
@pytest.mark.parametrize("config", [THREE_STAGES, FOUR_STAGES], ids=["three stages", "four stages"])
def test_same_features_as_timm(nfnet_module: ModuleType, config: NFNetConfig, image_size: int) -> None:
    theirs: Any = timm_twin(nfnet_module, config).double()
    randomise(theirs)
    ours = NFNet(config).double()
    ours.load_state_dict(renamed(theirs.state_dict()), strict=True)
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs.forward_features(pixels)
        found = ours(pixels)
    assert found.shape == (2, wanted.shape[2] * wanted.shape[3], config.feature_width)
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-11)


def test_f6_has_timms_parameters(nfnet_module: ModuleType) -> None:
    with torch.device("meta"):
        theirs = nfnet_module.dm_nfnet_f6(num_classes=0)
        ours = NFNet(NFNET_F6)
    wanted = {name: tensor.shape for name, tensor in renamed(theirs.state_dict()).items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == wanted
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == parameter_counts(SIZES["3b"])["vision_encoder"]
    assert round(count / 1e6, 1) == 435.3


@pytest.mark.parametrize("image_size", [64, 50, 33])
def test_grid_is_what_the_config_says(image_size: int) -> None:
    config = NFNetConfig(
        image_size=image_size, widths=(16, 32), depths=(1, 1), stem_widths=(4, 8, 8, 16), feature_width=24, group_width=8
    )
    found = NFNet(config)(torch.zeros(1, 3, image_size, image_size))
    assert found.shape == (1, config.num_patches, 24)


@pytest.mark.slow
def test_f6_grid() -> None:
    """320 pixels give 10 x 10 positions, 288 give 81, 480 give 225; on the meta device."""
    with torch.device("meta"):
        encoder = NFNet(NFNET_F6)
        for size, patches in ((320, 100), (288, 81), (480, 225)):
            assert encoder(torch.empty(1, 3, size, size)).shape == (1, patches, 3072)


@pytest.mark.parametrize("squeezed", [(16, 8), (22, 8), (24, 16), (28, 16), (256, 128), (1536, 768)])
def test_squeeze_width_is_timms(nfnet_module: ModuleType, squeezed: tuple[int, int]) -> None:
    from timm.layers.squeeze_excite import SEModule

    width, expected = squeezed
    assert squeeze_width(width, 0.5) == SEModule(width, rd_ratio=0.5).fc1.out_channels == expected


def test_padding_puts_the_odd_row_last() -> None:
    padded = pad_same(torch.ones(1, 1, 4, 5), kernel=3, stride=2)
    assert padded.shape == (1, 1, 5, 7)
    assert padded[0, 0, :, 3].tolist() == [1, 1, 1, 1, 0]
    assert padded[0, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_untrained_blocks_pass_their_shortcut_on() -> None:
    """SkipInit: at the start a block is its shortcut."""
    config = SIZES["nano"].vision
    assert isinstance(config, NFNetConfig)
    stage: Any = NFNet(config).stages[1]
    block, x = stage[1], torch.randn(1, config.widths[1], 4, 4)
    assert torch.equal(block(x), x)
