"""The hook points of the reference: what listens there sees the operands as they are multiplied, and may replace them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from flamingo_reference.config import SIZES, RelativePositions  # noqa: E402
from flamingo_reference.model import Flamingo  # noqa: E402
from flamingo_reference.model.layers import ACTIVATIONS  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Flamingo:
    torch.manual_seed(0)
    nano = SIZES["nano"]
    return Flamingo(msgspec.structs.replace(nano, name="hook points")).eval().requires_grad_(False)


def test_attention_by_hand_from_what_its_seam_is_given(model: Flamingo) -> None:
    """Queries carry their bias for contents there; one key gives its value whatever the query."""
    layer: Any = model.language_model.layers[0]
    config = model.config.language_model
    assert isinstance(config.positions, RelativePositions)
    torch.nn.init.normal_(layer.content_bias)
    seen: list[Any] = []
    handle = layer.operands.register_forward_hook(lambda _, __, found: seen.append(found))
    hidden = torch.randn(1, 1, config.width)
    output = layer(hidden)
    handle.remove()
    ((q, k, v),) = seen
    plain_q, plain_k, plain_v = layer.qkv(hidden)
    assert torch.equal(q, plain_q + layer.content_bias[:, None, :])
    assert torch.equal(k, plain_k)
    assert torch.equal(v, plain_v)
    summed = hidden + layer.out_proj(v.transpose(1, 2).flatten(2))
    right = summed + layer.ffw_down(ACTIVATIONS[config.feed_forward](layer.ffw_up(layer.ffw_norm(summed))))
    assert torch.allclose(output, right, atol=1e-6)


def test_what_a_hook_returns_is_used_instead(model: Flamingo) -> None:
    block = model.gated_blocks()[0]
    latents = torch.randn(2, model.config.resampler.num_latents, model.config.resampler.width)
    k, v = block.media_kv(latents)
    handle = block.media.register_forward_hook(lambda _, __, found: (found[0], found[1] * 2))
    try:
        changed_k, changed_v = block.media_kv(latents)
    finally:
        handle.remove()
    assert torch.equal(changed_k, k)
    assert torch.equal(changed_v, 2 * v)


def test_seams_have_no_tensors_of_their_own(model: Flamingo) -> None:
    assert not [name for name in model.state_dict() if "operands" in name or name.endswith("media")]
