"""The model's formulas in fp64 numpy, one number at a time where that is bearable: written from the papers, not from the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def weights_of(module: Any) -> dict[str, Array]:
    """A module's parameters by name."""
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


def layer_norm(x: Array, w: Mapping[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def gelu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def attend_one(q: Array, keys: Array, values: Array) -> Array:
    """One query [D] over keys and values [L, D]."""
    return softmax(np.array([q @ key for key in keys]) / math.sqrt(len(q))) @ values


def resampler(w: Mapping[str, Array], features: Array, time_weights: Array, heads: int) -> Array:
    """features [T, P, E] of one medium -> latents [R, W]."""
    media = []
    for frame, mix in zip(features, time_weights, strict=True):
        embedding = sum(share * row for share, row in zip(mix, w["time_embeddings"], strict=True))
        media += [w["input_proj.weight"] @ patch + embedding for patch in frame]
    x_f, x = np.array(media), w["latents"].copy()
    layer = 0
    while f"layers.{layer}.q_proj.weight" in w:
        at = {name.removeprefix(f"layers.{layer}."): value for name, value in w.items() if name.startswith(f"layers.{layer}.")}
        normed = layer_norm(x, at, "latent_norm")
        kv = np.concatenate([layer_norm(x_f, at, "media_norm"), normed])
        q, k, v = normed @ at["q_proj.weight"].T, kv @ at["k_proj.weight"].T, kv @ at["v_proj.weight"].T
        out = np.empty_like(q)
        size = q.shape[1] // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for row in range(len(q)):
                out[row, part] = attend_one(q[row, part], k[:, part], v[:, part])
        x = x + out @ at["out_proj.weight"].T
        up = np.maximum(layer_norm(x, at, "ffw_norm") @ at["ffw_up.weight"].T, 0.0)
        x = x + up**2 @ at["ffw_down.weight"].T
        layer += 1
    return layer_norm(x, w, "norm")


def gated_block(w: Mapping[str, Array], y: Array, latents: list[Array], phi: list[int], heads: int) -> Array:
    """hidden [S, W] of one request; latents [R, W'] of its media, phi counts them from 1."""
    attended = []
    for position, medium in enumerate(phi):
        q = w["q_proj.weight"] @ layer_norm(y[position], w, "norm")
        out = np.zeros_like(q)
        if medium > 0:
            k, v = latents[medium - 1] @ w["k_proj.weight"].T, latents[medium - 1] @ w["v_proj.weight"].T
            size = len(q) // heads
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                out[part] = attend_one(q[part], k[:, part], v[:, part])
        attended.append(out)
    y = y + math.tanh(w["attention_gate"]) * np.array(attended) @ w["out_proj.weight"].T
    up = np.maximum(layer_norm(y, w, "ffw_norm") @ w["ffw_up.weight"].T, 0.0)
    return y + math.tanh(w["ffw_gate"]) * up**2 @ w["ffw_down.weight"].T


def distance_encoding(distance: int, width: int) -> Array:
    """Dai et al. 2019: sines, then cosines."""
    angles = [distance / 10000.0 ** (2 * pair / width) for pair in range(width // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def lm_layer(w: Mapping[str, Array], h: Array, *, heads: int, max_positions: int, eps: float) -> Array:
    """hidden [S, W] of one sequence from position 0."""
    normed = rms_norm(h, w["attention_norm.weight"], eps)
    q, k, v = (normed @ w[f"{name}.weight"].T for name in ("q_proj", "k_proj", "v_proj"))
    size = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(h)):
            scores = []
            for j in range(i + 1):
                r = w["relative_proj.weight"] @ distance_encoding(min(i - j, max_positions - 1), h.shape[1])
                content = (q[i, part] + w["content_bias"][head]) @ k[j, part]
                position = (q[i, part] + w["position_bias"][head]) @ r[part]
                scores.append((content + position) / math.sqrt(size))
            out[i, part] = softmax(np.array(scores)) @ v[: i + 1, part]
    h = h + out @ w["out_proj.weight"].T
    return h + gelu(rms_norm(h, w["ffw_norm.weight"], eps) @ w["ffw_up.weight"].T) @ w["ffw_down.weight"].T
