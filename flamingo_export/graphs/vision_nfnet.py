"""The `vision_encoder` graph: NFNet with its kernels standardised and its activation gains folded into them.

pixels -> stem (4 convolutions) -> stages of blocks -> 1x1 convolution -> GELU -> features

block:   x -- GELU --+-- conv1 - GELU - conv2 - GELU - conv2b - GELU - conv3 -- squeeze-excite -- * branch_scale --+-- Add
                     +-- [average pool] -- downsample (or x itself) -----------------------------------------------+
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.towers import pooled
from flamingo_export.specs import subgraph_specs
from flamingo_export.weights import GELU_GAIN, WeightIndex
from flamingo_reference.config import ModelConfig, NFNetConfig
from flamingo_reference.names import needs_downsample


class _Grid:
    """Builds convolutions on a grid whose side is known, so that SAME padding is explicit."""

    def __init__(self, build: GraphBuilder, side: int) -> None:
        self.build, self.side = build, side

    def conv(self, x: ir.Value, name: str, *, kernel: int, stride: int = 1, groups: int = 1) -> ir.Value:
        prefix = "/".join(["vision_encoder", *self.build.scopes, name])
        out = -(-self.side // stride)
        total = max((out - 1) * stride + kernel - self.side, 0)
        before, after = total // 2, total - total // 2
        y: ir.Value = self.build.op(
            "Conv", x, self.build.weight(f"{prefix}/weight"), self.build.weight(f"{prefix}/bias"), name=name,
            kernel_shape=[kernel, kernel], strides=[stride, stride], group=groups, pads=[before, before, after, after],
        )  # fmt: skip
        return y


def vision_encoder(config: ModelConfig, vision: NFNetConfig, index: WeightIndex) -> ir.Model:
    """pixels [F, 3, I, I] -> features [F, P, E], and pooled [F, Ep] where there is a contrastive encoder."""
    spec = subgraph_specs(config)["vision_encoder"]
    build = GraphBuilder(index, prefix="vision_encoder")
    inputs = graph_inputs(spec)
    grid = _Grid(build, vision.image_size)
    x = inputs["pixels"]
    with build.scope("stem"):
        for i, stride in enumerate((2, 1, 1, 2)):
            if i:
                x = build.op("Gelu", x, name=f"{i}/gelu")
            x = grid.conv(x, str(i), kernel=3, stride=stride)
            grid.side = -(-grid.side // stride)
    width = vision.stem_widths[-1]
    for stage, (out, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
        for block in range(depth):
            with build.scope(f"stages/{stage}/{block}"):
                downsample = needs_downsample(stage, block, width, out)
                stride = 2 if block == 0 and stage > 0 else 1
                x = _block(grid, x, vision, out=out, stride=stride, downsample=downsample)
            width = out
    x = grid.conv(x, "final_conv", kernel=1)
    x = build.op("Gelu", x, name="final_gelu")
    x = build.op("Mul", x, build.constant(GELU_GAIN, dtype=np.float32), name="final_gain")
    x = build.reshape(x, [0, vision.feature_width, -1], name="flatten")
    features = build.op("Transpose", x, name="features", perm=[0, 2, 1])
    return build.model(spec, inputs, {"features": features, **pooled(build, config, features)})


def _block(grid: _Grid, x: ir.Value, vision: NFNetConfig, *, out: int, stride: int, downsample: bool) -> ir.Value:
    build = grid.build
    groups = int(out * vision.bottleneck_ratio) // vision.group_width
    active = build.op("Gelu", x, name="gelu")
    shortcut = x
    branch = grid.conv(active, "conv1", kernel=1)
    branch = grid.conv(build.op("Gelu", branch, name="gelu2"), "conv2", kernel=3, stride=stride, groups=groups)
    if downsample:
        pooled = active
        if stride > 1:
            pooled = build.op(
                "AveragePool", active, name="pool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, count_include_pad=0
            )
        grid.side = -(-grid.side // stride)
        shortcut = grid.conv(pooled, "downsample", kernel=1)
    branch = grid.conv(build.op("Gelu", branch, name="gelu2b"), "conv2b", kernel=3, groups=groups)
    branch = grid.conv(build.op("Gelu", branch, name="gelu3"), "conv3", kernel=1)
    prefix = "/".join(["vision_encoder", *build.scopes])
    with build.scope("squeeze_excite"):
        means = build.op("GlobalAveragePool", branch, name="means")
        squeezed = build.op("Relu", grid.conv(means, "fc1", kernel=1), name="relu")
        scale = build.op("Sigmoid", grid.conv(squeezed, "fc2", kernel=1), name="sigmoid")
        scale = build.op("Mul", scale, build.weight(f"{prefix}/branch_scale"), name="branch_scale")
    branch = build.op("Mul", branch, scale, name="excite")
    return build.op("Add", branch, shortcut, name="residual")  # type: ignore[no-any-return]
