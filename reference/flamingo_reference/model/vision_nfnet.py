"""NFNet vision encoder (Brock et al. 2021, arXiv 2102.06171), without classifier: pixels to a grid of features.

Shape suffixes: F frames, C channels, Y X rows and columns of the grid, P = Y * X patches, E feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import NFNetConfig
from flamingo_reference.names import needs_downsample, squeeze_width

# Makes unit-variance input leave GELU with unit variance: Brock et al. 2021, appendix; the value is DeepMind's.
GELU_GAIN = 1.7015043497085571
# The squeeze-excite branch is doubled, so that its sigmoid of about one half keeps the variance.
SQUEEZE_EXCITE_GAIN = 2.0
STANDARDISATION_EPS = 1e-5


def scaled_gelu(x: Tensor) -> Tensor:
    """erf GELU times the gain that preserves variance."""
    return F.gelu(x) * GELU_GAIN


def pad_same(x_FCYX: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME padding: the odd row or column goes to the bottom and right."""
    sides = []
    for size in (x_FCYX.shape[-1], x_FCYX.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x_FCYX, sides)


class StandardisedConv(nn.Module):
    """Convolution whose kernels are standardised over their fan-in: gain * (w - mean) / sqrt(fan_in * var + eps')."""

    def __init__(self, into: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, into // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out))
        self.gain = nn.Parameter(torch.ones(out, 1, 1, 1))
        self.kernel, self.stride, self.groups = kernel, stride, groups

    def standardised_weight(self) -> Tensor:
        """The kernels the convolution applies [out, in / groups, k, k]."""
        fan_in = self.weight[0].numel()
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        scale: Tensor = self.gain * fan_in**-0.5 * torch.rsqrt(variance + STANDARDISATION_EPS)
        return (self.weight - mean) * scale

    def forward(self, x_FCYX: Tensor) -> Tensor:
        padded = pad_same(x_FCYX, self.kernel, self.stride)
        return F.conv2d(padded, self.standardised_weight(), self.bias, stride=self.stride, groups=self.groups)


class SqueezeExcite(nn.Module):
    """Scales each channel by a sigmoid of the channel means."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x_FCYX: Tensor) -> Tensor:
        means = x_FCYX.mean(dim=(2, 3), keepdim=True)
        return x_FCYX * torch.sigmoid(self.fc2(F.relu(self.fc1(means))))


class NFBlock(nn.Module):
    """Pre-activation bottleneck: shortcut + alpha * skip_gain * branch(beta * act(x))."""

    def __init__(self, config: NFNetConfig, *, into: int, out: int, stride: int, downsample: bool, beta: float) -> None:
        super().__init__()
        middle = int(out * config.bottleneck_ratio)
        groups = middle // config.group_width
        self.alpha, self.beta, self.stride = config.alpha, beta, stride
        self.downsample = StandardisedConv(into, out, 1) if downsample else None
        self.conv1 = StandardisedConv(into, middle, 1)
        self.conv2 = StandardisedConv(middle, middle, 3, stride=stride, groups=groups)
        self.conv2b = StandardisedConv(middle, middle, 3, groups=groups)
        self.conv3 = StandardisedConv(middle, out, 1)
        self.squeeze_excite = SqueezeExcite(out, squeeze_width(out, config.squeeze_excite_ratio))
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x_FCYX: Tensor) -> Tensor:
        active = scaled_gelu(x_FCYX) * self.beta
        shortcut = x_FCYX
        if self.downsample is not None:
            pooled = active
            if self.stride > 1:
                pooled = F.avg_pool2d(active, 2, self.stride, ceil_mode=True, count_include_pad=False)
            shortcut = self.downsample(pooled)
        branch = self.conv1(active)
        branch = self.conv2(scaled_gelu(branch))
        branch = self.conv2b(scaled_gelu(branch))
        branch = self.conv3(scaled_gelu(branch))
        branch = SQUEEZE_EXCITE_GAIN * self.squeeze_excite(branch)
        summed: Tensor = branch * self.skip_gain * self.alpha + shortcut
        return summed


class NFNet(nn.Module):
    """pixels [F, 3, I, I] -> features [F, P, E], rows of the grid first."""

    def __init__(self, config: NFNetConfig) -> None:
        super().__init__()
        self.config = config
        stem: list[StandardisedConv] = []
        width = 3
        for out, stride in zip(config.stem_widths, (2, 1, 1, 2), strict=True):
            stem.append(StandardisedConv(width, out, 3, stride=stride))
            width = out
        self.stem = nn.ModuleList(stem)
        stages = []
        variance = 1.0
        for stage, (out, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 and stage > 0 else 1
                downsample = needs_downsample(stage, block, width, out)
                blocks.append(NFBlock(config, into=width, out=out, stride=stride, downsample=downsample, beta=variance**-0.5))
                # The shortcut's convolution at the head of a stage brings the variance back to one.
                variance = (1.0 if block == 0 else variance) + config.alpha**2
                width = out
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.final_conv = StandardisedConv(width, config.feature_width, 1)

    def forward(self, pixels_F3II: Tensor) -> Tensor:
        x = pixels_F3II
        for index, conv in enumerate(self.stem):
            x = conv(x if index == 0 else scaled_gelu(x))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        return scaled_gelu(self.final_conv(x)).flatten(2).transpose(1, 2)
